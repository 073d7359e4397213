"""Hugging Face's folders: the logits of transformers, there and back, in one file or many."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlm

transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")

SMALL = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {**SMALL, "hidden_size": 48, "intermediate_size": 96, "initializer_range": 0.2}
GPT2 = {"vocab_size": 101, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


def rope(**parameters) -> dict:
    """The config's rotary options, under the names of the installed version."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": parameters}
    theta = parameters.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": parameters if parameters.get("rope_type") != "default" else None}


MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "gpt2-options": ("GPT2", {**GPT2, "n_inner": 80, "activation_function": "relu", "scale_attn_weights": False}),
    "llama": ("Llama", LLAMA),
    "llama-gqa-tied": ("Llama", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {**LLAMA, "num_key_value_heads": 1, "head_dim": 20}),
    "llama-biases": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": ("Llama", {**LLAMA, **rope(**LLAMA_3)}),
    "llama-linear-rope": ("Llama", {**LLAMA, **rope(rope_type="linear", rope_theta=1000.0, factor=2.0)}),
    "llama-linear-shrinks": ("Llama", {**LLAMA, **rope(rope_type="linear", rope_theta=1000.0, factor=0.5)}),
    "llama-3-rope-step": ("Llama", {**LLAMA, **rope(**{**LLAMA_3, "low_freq_factor": 4.0})}),
    "llama-yarn": ("Llama", {**LLAMA, **rope(**YARN)}),
    "llama-yarn-options": ("Llama", {**LLAMA, **rope(**YARN, beta_fast=4, beta_slow=0.5, attention_factor=0.7)}),
    "mistral": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 8}),
    "mistral-no-window": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "phi3": ("Phi3", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 8, "pad_token_id": None}),
    "qwen2": ("Qwen2", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {**LLAMA, "num_key_value_heads": 1, "head_dim": 12, "attention_bias": True}),
}


def make(name: str) -> torch.nn.Module:
    """A transformers model whose every parameter is random (its own start leaves biases 0 and norms 1)."""
    family, options = MODELS[name]
    torch.manual_seed(0)
    options = {"bos_token_id": None, "eos_token_id": None, **options}
    config = getattr(transformers, f"{family}Config")(**options)
    causal = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, causal)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def ids(vocab_size: int = 101) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_and_back(name, tmp_path):
    theirs = make(name)
    expected = theirs(ids()).logits
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()

    model = fastlm.GPT.from_pretrained(tmp_path / "theirs")
    assert not model.training and model.wte.weight.dtype == torch.float32
    assert (model(ids())[0] - expected).abs().max() < 1e-4

    model.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    # Mistral without a window is Llama, and is written as Llama; Phi-3 is Mistral with packed weights
    assert type(back) is type(theirs) or name in ("mistral-no-window", "phi3")
    assert (back.eval()(ids()).logits - expected).abs().max() < 1e-4

    again = fastlm.GPT.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    for (key, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), key


@torch.no_grad()
def test_folder_of_transformers_4(tmp_path):
    """rope_theta and rope_scaling beside each other, `type`, and the tensors that old versions saved."""
    theirs = make("llama-3-rope")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields.pop("rope_parameters", None)
    scaling = {**LLAMA_3, "type": "llama3"}
    del scaling["rope_theta"], scaling["rope_type"]
    file.write_text(json.dumps({**fields, "rope_theta": 500.0, "rope_scaling": scaling}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_file(tensors, tmp_path / "model.safetensors")
    assert (fastlm.GPT.from_pretrained(tmp_path)(ids())[0] - theirs(ids()).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 8}, "original_max_position_embeddings": 16},
        {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 32},
        {"rope_parameters": YARN, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 900.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 900.0},
    ],
    ids=["yarn-beside", "yarn-twice", "llama3-twice", "both-spellings", "theta-twice"],
)
@torch.no_grad()
def test_rotary_options_that_stand_twice(fields, tmp_path):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the order is that of transformers 5")
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    given = json.loads(file.read_text())
    del given["rope_parameters"]
    file.write_text(json.dumps({**given, **fields}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (fastlm.GPT.from_pretrained(tmp_path)(ids())[0] - theirs(ids()).logits).abs().max() < 1e-4


@torch.no_grad()
def test_gpt2_as_first_published(tmp_path):
    """No prefix on the names, and the causal mask among the tensors."""
    theirs = make("gpt2")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert (fastlm.GPT.from_pretrained(tmp_path)(ids())[0] - theirs(ids()).logits).abs().max() < 1e-4


@torch.no_grad()
def test_gpt2_with_the_generic_names(tmp_path):
    theirs = make("gpt2")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for generic, own in (("hidden_size", "n_embd"), ("max_position_embeddings", "n_positions")):
        fields[generic] = fields.pop(own)
    fields |= {"num_hidden_layers": fields.pop("n_layer"), "num_attention_heads": 2}  # beside n_head: it counts
    file.write_text(json.dumps(fields))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids()).logits
    model = fastlm.GPT.from_pretrained(tmp_path)
    assert model.config.n_head == 2 and (model(ids())[0] - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_gpt_without_biases_is_a_gpt2_with_zeros(tmp_path):
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.preset("nano", n_layer=2, init_std=0.2))
    model.save_pretrained(tmp_path, extra_config={"eos_token_id": 10})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.eos_token_id == 10
    assert (theirs(ids(256)).logits - model(ids(256))[0]).abs().max() < 1e-4


@torch.no_grad()
def test_dtypes(tmp_path):
    theirs = make("llama-gqa-tied").bfloat16()
    theirs.save_pretrained(tmp_path / "low")
    assert fastlm.GPT.from_pretrained(tmp_path / "low").wte.weight.dtype == torch.float32
    model = fastlm.GPT.from_pretrained(tmp_path / "low", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.wte.weight, theirs.model.embed_tokens.weight)
    model.float().save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(tmp_path):
    theirs = make("llama-gqa-tied")
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(ids()[:, :5], max_new_tokens=20, do_sample=False, pad_token_id=0)
    model = fastlm.GPT.from_pretrained(tmp_path)
    assert torch.equal(model.generate(ids()[:, :5], 20, temperature=0), expected)
