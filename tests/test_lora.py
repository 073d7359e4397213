"""LoRA: nothing changes until it learns; merging is exact; folders are peft's."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlm
from fastlm.models.huggingface import model_from_pretrained
from fastlm.models.lora import add_lora, has_lora, load_lora, merge, remove_lora, save_lora, unmerge

GPT2 = {"vocab_size": 61, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "init_std": 0.2}
LLAMA = {**GPT2, "norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2}
BERT = {**GPT2, "dropout": 0.0}
IDX = torch.randint(4, 61, (2, 20), generator=torch.Generator().manual_seed(1))


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind in ("bert", "roberta"):
        return fastlm.Encoder(fastlm.EncoderConfig(**BERT, layout=kind)).eval()
    return fastlm.GPT(fastlm.GPTConfig(**(GPT2 if kind == "gpt2" else LLAMA))).eval()


def randomize(model: torch.nn.Module) -> None:
    """As if the adapters had learned something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDX)[0]


@pytest.mark.parametrize("targets", ["qv", "attention", "all"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_adapters_learn_alone_and_merge_exactly(kind, targets):
    model = make(kind)
    before = logits(model)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    add_lora(model, rank=3, alpha=6, targets=targets)
    assert torch.equal(logits(model), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)

    model.train()
    model(IDX, IDX)[1].backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_B" in n)
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)
    model.eval()
    randomize(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-2

    merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    merge(model)  # a second time changes nothing
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    unmerge(model)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert torch.equal(logits(model), adapted)

    merge(model)
    remove_lora(model)
    assert not has_lora(model) and all(p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == weights.keys()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_the_number_of_trained_parameters():
    model = make("bert")
    add_lora(model, rank=3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 3 * (32 + 32)  # layers, q and v


@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "roberta"])
def test_folders_are_those_of_peft(kind, targets, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = make(kind)
    model.save_pretrained(tmp_path / "base")
    add_lora(model, rank=3, alpha=6, targets=targets)
    randomize(model)
    save_lora(model, tmp_path / "adapter", base="base")
    auto = transformers.AutoModelForCausalLM if kind in ("gpt2", "llama") else transformers.AutoModelForMaskedLM

    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (theirs(IDX).logits - logits(model)).abs().max() < 1e-4

    # and the other way: adapters that peft made and saved, with its own choice of modules
    config = peft.LoraConfig(r=4, lora_alpha=12, **({"target_modules": "all-linear"} if targets == "all" else {}))
    theirs = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "peft")
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    ours = make(kind)
    if any("predictions" in n or "lm_head" in n for n in names):  # the head: fastlm adapts the blocks
        with pytest.raises(ValueError, match="has no place in this one"):
            load_lora(ours, tmp_path / "peft")
        return
    load_lora(ours, tmp_path / "peft")
    with torch.no_grad():
        assert (theirs(IDX).logits - logits(ours)).abs().max() < 1e-4
    save_lora(ours, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == names


def test_a_model_folder_with_adapters_beside_it(tmp_path):
    model = make("bert")
    add_lora(model, rank=2)
    randomize(model)
    model.save_pretrained(tmp_path / "own", format="fastlm")
    assert (tmp_path / "own" / "adapter" / "adapter_config.json").is_file()
    again = model_from_pretrained(tmp_path / "own")
    assert has_lora(again) and torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="merge them first"):
        model.save_pretrained(tmp_path / "hf")
    merge(model)
    model.save_pretrained(tmp_path / "own", format="fastlm")  # replaces it: the adapters are part of the weights now
    assert not (tmp_path / "own" / "adapter").exists()
    assert torch.equal(logits(model_from_pretrained(tmp_path / "own")), logits(model))


@pytest.mark.parametrize("targets", [["qkv_proj"], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]])
def test_adapters_beside_phi3s_packed_projections(targets, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    transformers.Phi3ForCausalLM(transformers.Phi3Config(**options)).save_pretrained(tmp_path / "phi3")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "phi3")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=targets)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
        expected = theirs(IDX).logits
    theirs.save_pretrained(tmp_path / "theirs")

    model = fastlm.GPT.from_pretrained(tmp_path / "phi3")
    load_lora(model, tmp_path / "theirs")
    assert (logits(model) - expected).abs().max() < 1e-4
    save_lora(model, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "phi3")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
        assert (again(IDX).logits - expected).abs().max() < 1e-4
    merge(model)
    assert (logits(model) - expected).abs().max() < 1e-4


def test_adapters_that_a_phi3_folder_has_no_names_for(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    transformers.Phi3ForCausalLM(transformers.Phi3Config(**options, num_attention_heads=4)).save_pretrained(tmp_path)
    model = fastlm.GPT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "llama")
    add_lora(model, rank=2)
    randomize(model)
    with pytest.raises(ValueError, match=r"Phi-3 folder .* has no model\.layers\.0\.self_attn\.q_proj"):
        save_lora(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "own", format="fastlm")
    own = fastlm.GPT.from_pretrained(tmp_path / "own")
    assert torch.equal(logits(own), logits(model))
    save_lora(own, tmp_path / "adapter")  # the names of the model saved as Llama
    llama = fastlm.GPT.from_pretrained(tmp_path / "llama")
    load_lora(llama, tmp_path / "adapter")
    assert torch.equal(logits(llama), logits(model))


def test_adapters_of_an_encoder_without_a_head(tmp_path):
    """Their names are those in AutoModel, which has no `bert.` in front."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = fastlm.Encoder(fastlm.EncoderConfig(**BERT, mlm_head=False)).eval()
    model.save_pretrained(tmp_path / "base")
    add_lora(model, rank=2)
    randomize(model)
    save_lora(model, tmp_path / "adapter")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        hidden = model.hidden_states(IDX)
        assert (theirs(IDX).last_hidden_state - hidden).abs().max() < 1e-4
    again = fastlm.Encoder.from_pretrained(tmp_path / "base")
    load_lora(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.hidden_states(IDX), hidden)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES)
def test_the_dtype_of_the_weights_makes_no_other_model(half, tmp_path):
    """Adapters trained beside float32 go beside its half precision and back; one changed number is another model."""
    for trained, held in ((torch.float32, half), (half, torch.float32), (half, half)):
        model = make("gpt2").to(trained)
        add_lora(model, rank=2)
        save_lora(model, tmp_path / "adapter")
        load_lora(make("gpt2").to(held), tmp_path / "adapter")
        changed = make("gpt2")
        with torch.no_grad():
            changed.blocks[1].attention.qkv.weight[3, 4] *= 1.01
        with pytest.raises(ValueError, match="trained beside other weights"):
            load_lora(changed.to(held), tmp_path / "adapter")

    model = make("bert")
    add_lora(model, rank=2)
    randomize(model)
    model.save_pretrained(tmp_path / "own", format="fastlm", dtype=half)
    for dtype in ("auto", torch.float32):
        again = model_from_pretrained(tmp_path / "own", dtype=dtype)
        assert (logits(again.float()) - logits(model)).abs().max() < 0.2


def test_folders_with_one_digest_are_loaded(tmp_path):
    """As they were written first: of the weights as they were held."""
    model = make("bert")
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if name.endswith(("attention.qkv.weight", "wte.weight")):
            digest.update(name.encode() + p.detach().numpy().tobytes())
    add_lora(model, rank=2)
    save_lora(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"fastlm_base": digest.hexdigest()})
    load_lora(make("bert"), tmp_path)
    with pytest.raises(ValueError, match="trained beside other weights"):
        load_lora(make("roberta"), tmp_path)


def test_adapters_of_another_model_are_refused(tmp_path):
    model = make("bert")
    add_lora(model, rank=2)
    save_lora(model, tmp_path / "a")
    with pytest.raises(ValueError, match="adapters already"):
        load_lora(model, tmp_path / "a")
    other = make("bert")
    with torch.no_grad():
        other.wte.weight.add_(1)
    with pytest.raises(ValueError, match="trained beside other weights than this model's"):
        load_lora(other, tmp_path / "a")

    def without_digest(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")

    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    without_digest(tensors)
    with pytest.raises(ValueError, match=r"has no place in this one \(gpt2, 2 layers\)"):
        load_lora(make("gpt2"), tmp_path / "a")
    without_digest({n: torch.zeros(2, 48) if "lora_A" in n else t for n, t in tensors.items()})
    with pytest.raises(ValueError, match="is for a width of 48, this model's is 32"):
        load_lora(make("bert"), tmp_path / "a")
    without_digest({n: t for n, t in tensors.items() if "layer.1.attention.self.query.lora_B" not in n})
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.query lacks one of A and B"):
        load_lora(make("bert"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True, which fastlm does not have"):
        load_lora(make("bert"), tmp_path / "a")
    for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq"):  # they change the weights beside the adapters
        file.write_text(json.dumps({**config, "init_lora_weights": start}))
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which may change the model's own weights"):
            load_lora(make("bert"), tmp_path / "a")
    file.write_text(json.dumps({**config, "alora_invocation_tokens": [3, 4]}))
    with pytest.raises(ValueError, match=r"alora_invocation_tokens=\[3, 4\], which fastlm does not have"):
        load_lora(make("bert"), tmp_path / "a")
    save_lora(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    for start in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
        load_lora(make("bert"), tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no folder of LoRA adapters"):
        load_lora(make("bert"), tmp_path)
    with pytest.raises(ValueError, match="rank of at least 1"):
        add_lora(make("bert"), rank=0)
