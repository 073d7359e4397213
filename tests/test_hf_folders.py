"""Model folders: our own format, what is refused and how, and that a save is whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlm
from fastlm import files
from fastlm.models.huggingface import save
from fastlm.models.huggingface.configs import config_from_huggingface

TINY = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2}


def tiny(seed: int = 0, **changes) -> fastlm.GPT:
    torch.manual_seed(seed)
    return fastlm.GPT(fastlm.GPTConfig.from_dict({**TINY, **changes}))


def logits(model: fastlm.GPT) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(16)[None])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 folder in several files."""
    tiny().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return tmp_path / "model"


def edit(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(folder: Path, change) -> None:
    """Apply `change` to the dict of tensors of a folder in one file."""
    tiny().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [{"position": "alibi", "bias": False}, {**LLAMA, "logit_softcap": 5.0}, {**LLAMA, "rope_scaling": {"factor": 4.0}}],
    ids=["alibi", "softcap", "rope"],
)
@pytest.mark.parametrize("size", ["1GB", 30_000])
def test_our_own_format_holds_any_config(changes, size, tmp_path):
    model = tiny(**changes)
    model.save_pretrained(tmp_path / "model", format="fastlm", max_shard_size=size)
    again = fastlm.GPT.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))


def test_shards_are_as_small_as_asked(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 30_000 or len(tensors) == 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())


def test_fields_can_be_changed_on_loading(folder):
    model = fastlm.GPT.from_pretrained(folder, dropout=0.1)
    assert model.config.dropout == 0.1 and model.blocks[0].dropout == 0.1
    with pytest.raises(ValueError, match=r"no field 'droput' \(did you mean 'dropout'\?\)"):
        fastlm.GPT.from_pretrained(folder, droput=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi"}, "gpt2 cannot express this model .position is 'alibi', not 'learned'.*format='fastlm'"),
        ({"n_kv_head": 2}, "n_kv_head is 2, not 4"),
        ({"activation": "swiglu"}, "activation is 'swiglu'"),
        ({**LLAMA, "logit_softcap": 2.0}, "llama cannot express this model .logit_softcap is 2.0"),
        ({**LLAMA, "attention_bias": True}, "biases of"),
    ],
)
def test_what_transformers_cannot_express(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny(**changes).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def remove_shard(folder):
    (folder / "model-00002-of-00005.safetensors").unlink()


def truncate_shard(folder):
    file = folder / "model-00001-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_weights(folder):
    for file in folder.glob("*safetensors*"):
        file.unlink()


def pickle_only(folder):
    remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), FileNotFoundError, "does not exist: give a folder .* fastlm downloads nothing"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json; it holds: model-00001"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold a JSON object, got a list"),
        (
            lambda f: edit(f, model_type="bert"),
            ValueError,
            "model_type 'bert', a masked model .* wanted here: gpt2, llama, mistral",
        ),
        (lambda f: edit(f, model_type=None), ValueError, "no model_type .architectures: .*GPT2LMHeadModel"),
        (
            lambda f: edit(f, model_type="llama"),
            ValueError,
            "lacks the field 'max_position_embeddings'|lacks the field",
        ),
        (lambda f: edit(f, quantization_config={"bits": 4}), ValueError, "quantised"),
        (
            lambda f: edit(f, activation_function="tanh"),
            ValueError,
            "activation_function 'tanh' is not one of: gelu_new",
        ),
        (
            lambda f: edit(f, add_cross_attention=True),
            ValueError,
            "add_cross_attention=True, which fastlm does not have",
        ),
        (lambda f: edit(f, n_embd=36), ValueError, r"wte.weight has shape \(61, 32\); config.json asks for \(61, 36\)"),
        (lambda f: edit(f, n_layer=1), ValueError, "12 unknown:\n    h.1.attn.c_attn.bias"),
        (lambda f: edit(f, tie_word_embeddings=False), ValueError, "1 missing:\n    lm_head.weight"),
        (remove_shard, FileNotFoundError, "1 of the 5 files .* are missing: model-00002-of-00005.safetensors"),
        (truncate_shard, ValueError, "model-00001-of-00005.safetensors is not a whole safetensors file"),
        (
            remove_weights,
            FileNotFoundError,
            "neither model.safetensors nor model.safetensors.index.json; it holds: config",
        ),
        (pickle_only, ValueError, r"pickle files only \(pytorch_model.bin\)"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ValueError, "is not an index"),
    ],
)
def test_damaged_and_foreign_folders(damage, error, message, folder):
    damage(folder)
    with pytest.raises(error, match=message):
        fastlm.GPT.from_pretrained(folder)


def test_wrong_tensors(tmp_path):
    def rename(tensors):
        tensors["transformer.h.0.ln_one.weight"] = tensors.pop("transformer.h.0.ln_1.weight")

    edit_tensors(tmp_path / "renamed", rename)
    with pytest.raises(
        ValueError, match=r"1 missing:\n    h.0.ln_1.weight \(there is h.0.ln_one.weight\)\n  1 unknown"
    ):
        fastlm.GPT.from_pretrained(tmp_path / "renamed")

    def integers(tensors):
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.int8)

    edit_tensors(tmp_path / "integers", integers)
    with pytest.raises(ValueError, match=r"wte.weight is stored as I8; fastlm loads F64, F32, F16, BF16"):
        fastlm.GPT.from_pretrained(tmp_path / "integers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate = false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"is_causal": False}, "is_causal=False; fastlm.GPT is causal"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "in some layers only"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "in some layers only",
        ),
    ],
)
def test_options_of_the_llama_family_that_are_not_there(fields, message, tmp_path):
    tiny(**LLAMA).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", **fields)
    with pytest.raises(ValueError, match=message):
        fastlm.GPT.from_pretrained(tmp_path / "model")


def test_the_dropouts_of_phi3_are_those_of_transformers():
    """Of the two branches and of the attention weights; embd_pdrop is read by nobody there."""
    given = {"model_type": "phi3", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    given |= {"max_position_embeddings": 16, "intermediate_size": 8, "embd_pdrop": 0.3}
    config = config_from_huggingface({**given, "resid_pdrop": 0.1, "attention_dropout": 0.2})
    assert (config.dropout, config.attention_dropout, config.embedding_dropout) == (0.1, 0.2, 0.0)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"max_window_layers": 0}, 7),
        ({"max_window_layers": 2}, None),  # from the third of two layers on
        ({"max_window_layers": 1, "layer_types": ["sliding_attention"] * 2}, 7),
        ({"max_window_layers": 0, "use_sliding_window": False}, None),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_sliding_window_in_all_layers_or_in_none(kind, fields, window):
    given = {"model_type": kind, "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    given |= {"num_key_value_heads": None, "max_position_embeddings": 16, "intermediate_size": 8, "head_dim": 4}
    config = config_from_huggingface({**given, "use_sliding_window": True, "sliding_window": 7, **fields})
    assert config.sliding_window == window and config.kv_heads == 2 and config.qk_norm == (kind == "qwen3")


def test_a_save_replaces_the_model_and_keeps_the_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a")
    other = tiny(seed=1, **LLAMA)
    other.save_pretrained(folder)
    names = {entry.name for entry in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "notes"}
    assert (folder / "notes" / "a.txt").read_text() == "a"
    assert torch.equal(logits(fastlm.GPT.from_pretrained(folder)), logits(other))
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("exchange", ["one step", "two renames"])
@pytest.mark.parametrize("fails_at", ["first file", "third file", "renaming"])
def test_a_save_that_fails_changes_nothing(fails_at, exchange, folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    written = []

    def full_disk(tensors, file, metadata=None):
        written.append(file)
        if len(written) == {"first file": 1, "third file": 3}.get(fails_at):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata=metadata)

    def cannot_rename(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(save, "save_file", full_disk)
    if exchange == "two renames":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    if fails_at == "renaming":
        monkeypatch.setattr(files, "exchange", cannot_rename)
    with pytest.raises(OSError):
        tiny(seed=1).save_pretrained(folder, max_shard_size="30KB")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


FULL_DISK_THEN_KILL = """
import os, resource, signal, sys
import fastlm
from fastlm.models.huggingface import save

model = fastlm.GPT(fastlm.GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32))
limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit))  # the system refuses to write more to a file
try:
    model.save_pretrained(sys.argv[1], max_shard_size="30KB")
except OSError as error:
    print(error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
save.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL) if path.suffix == ".safetensors" else None
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits and SIGKILL are POSIX")
def test_a_real_write_error_and_a_kill_leave_the_model_whole(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_THEN_KILL, folder], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "is unchanged: model-00001-of-00005.safetensors could not be written" in done.stdout
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    leftovers = [entry.name for entry in folder.parent.iterdir() if entry != folder]
    assert len(leftovers) == 1 and leftovers[0].startswith(".model.")  # of the kill; the write error left nothing


def test_folders_are_replaced_without_the_system_call(folder, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    other = tiny(seed=1)
    other.save_pretrained(folder)
    assert torch.equal(logits(fastlm.GPT.from_pretrained(folder)), logits(other))
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_where_a_model_is_not_saved(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        tiny().save_pretrained(tmp_path / "file")
    with pytest.raises(FileExistsError, match="something else than a model"):
        tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_shard_size must be bytes or a size such as '5GB'"):
        tiny().save_pretrained(tmp_path / "new", max_shard_size="5 gigs")
    with pytest.raises(ValueError, match="format must be 'huggingface' or 'fastlm'"):
        tiny().save_pretrained(tmp_path / "new", format="gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_too_small_is_seen_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="1,000 are free; nothing was written"):
        tiny().save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
