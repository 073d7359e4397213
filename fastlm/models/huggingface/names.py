"""Which tensors of a checkpoint make up each parameter of `fastlm.GPT` and `fastlm.Encoder`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastlm.models.config import GPTConfig
from fastlm.models.encoder_config import EncoderConfig
from fastlm.models.huggingface.configs import LLAMA_FAMILY, config_to_huggingface
from fastlm.models.huggingface.encoder_configs import OWN


@dataclass(frozen=True)
class Source:
    """A parameter is these tensors one below the other (along dimension 0), each transposed where `transposed`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of each part of the parameter
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows of the parameter each tensor is."""
        return tuple(shape[0] for shape in self.shapes)

    @property
    def stored_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes in the file."""
        return tuple(shape[::-1] if self.transposed else shape for shape in self.shapes)


# The prefix of the model inside the language model. Some folders have it (the language model was saved), some not.
PREFIX = {"gpt2": "transformer.", "fastlm": "", OWN: "", "bert": "bert.", "roberta": "roberta."}
PREFIX |= dict.fromkeys(LLAMA_FAMILY, "model.")
_HEADS = ("lm_head.", "cls.")  # beside the model, without its prefix
# Constants that old versions of transformers saved; every model computes them itself.
_IGNORED = re.compile(r"^h\.\d+\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
# Of an encoder: the same, what guesses the next sentence, and the copies of what is tied.
_IGNORED_ENCODER = re.compile(
    r"^embeddings\.position_ids$|^cls\.seq_relationship\.|^(cls\.predictions|lm_head)\.decoder\.(weight|bias)$"
)


def folder_kind(config: GPTConfig | EncoderConfig) -> str:
    """The architecture of transformers that a configuration is saved as; "fastlm" where there is none."""
    if isinstance(config, EncoderConfig):
        return config.layout
    try:
        return str(config_to_huggingface(config)["model_type"])
    except ValueError:
        return "fastlm"


def bare(name: str, kind: str) -> str:
    """A tensor's name without the prefix of its architecture."""
    return name.removeprefix(PREFIX.get(kind, ""))


def rename_old(tensors: dict[str, Any]) -> None:
    """Names that only some versions of transformers wrote, as they are today (in place)."""
    for name in list(tensors):
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        for head in ("cls.predictions", "lm_head"):
            if name == f"{head}.decoder.bias" and f"{head}.bias" not in tensors:
                new = f"{head}.bias"
        if new != name:
            tensors[new] = tensors.pop(name)


def full(name: str, kind: str) -> str:
    """A tensor's name as the language model of its architecture saves it."""
    return name if name.startswith(_HEADS) else PREFIX[kind] + name


def is_ignored(name: str, config: GPTConfig | EncoderConfig) -> bool:
    """Whether a tensor (its bare name) is none of the weights: a saved constant, or the copy of a tied head."""
    if isinstance(config, EncoderConfig):
        return _IGNORED_ENCODER.search(name) is not None
    return _IGNORED.search(name) is not None or (config.tie_embeddings and name == "lm_head.weight")


def sources(config: GPTConfig | EncoderConfig, kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
    """For each parameter of the model (name -> shape), the tensors that it is made of, by their bare names."""
    own: dict[str, Any] = {"gpt2": _gpt2, "phi3": _phi3, "fastlm": _own, OWN: _own, "bert": _bert, "roberta": _bert}
    find = own.get(kind, _llama)
    return {name: find(name, shape, config) for name, shape in shapes.items()}


_GPT2 = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
_LLAMA = {
    "norm_1": ("input_layernorm",),
    "norm_2": ("post_attention_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.proj": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.proj": ("mlp.down_proj",),
}
_PHI3 = {"attention.qkv": "self_attn.qkv_proj", "mlp.fc": "mlp.gate_up_proj"}  # packed as ours are; the rest is Llama's

_BERT = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.proj": ("attention.output.dense",),
    "norm_1": ("attention.output.LayerNorm",),
    "mlp.fc": ("intermediate.dense",),
    "mlp.proj": ("output.dense",),
    "norm_2": ("output.LayerNorm",),
}
_BERT_OUTSIDE = {
    "wte": "embeddings.word_embeddings",
    "wpe": "embeddings.position_embeddings",
    "wtt": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_BERT_HEAD = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
}
_ROBERTA_HEAD = {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head": "lm_head"}


def _own(name: str, shape: tuple[int, ...], config: GPTConfig) -> Source:
    return Source((name,), (shape,))


def _gpt2(name: str, shape: tuple[int, ...], config: GPTConfig) -> Source:
    if not name.startswith("blocks."):
        return Source((name.replace("norm.", "ln_f."),), (shape,))
    layer, module, kind = _split(name)
    # GPT-2's Conv1D keeps its weight as (in, out)
    return Source((f"h.{layer}.{_GPT2[module]}.{kind}",), (shape,), transposed=len(shape) == 2)


def _llama(name: str, shape: tuple[int, ...], config: GPTConfig) -> Source:
    if not name.startswith("blocks."):
        return Source((name.replace("wte.", "embed_tokens."),), (shape,))
    layer, module, kind = _split(name)
    rows = [shape[0]]
    if module == "attention.qkv":
        rows = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    elif module == "mlp.fc":
        rows = [config.mlp_size, config.mlp_size]
    names = tuple(f"layers.{layer}.{theirs}.{kind}" for theirs in _LLAMA[module])
    return Source(names, tuple((n, *shape[1:]) for n in rows))


def _phi3(name: str, shape: tuple[int, ...], config: GPTConfig) -> Source:
    if name.startswith("blocks."):
        layer, module, kind = _split(name)
        if module in _PHI3:
            return Source((f"layers.{layer}.{_PHI3[module]}.{kind}",), (shape,))
    return _llama(name, shape, config)


def _bert(name: str, shape: tuple[int, ...], config: EncoderConfig) -> Source:
    if not name.startswith("blocks."):
        head = _BERT_HEAD if config.layout == "bert" else _ROBERTA_HEAD
        module, _, kind = name.rpartition(".")
        return Source((f"{(_BERT_OUTSIDE | head)[module]}.{kind}",), (shape,))
    layer, module, kind = _split(name)
    names = tuple(f"encoder.layer.{layer}.{theirs}.{kind}" for theirs in _BERT[module])
    return Source(names, ((shape[0] // len(names), *shape[1:]),) * len(names))


def _split(name: str) -> tuple[str, str, str]:
    """blocks.3.attention.qkv.weight -> 3, attention.qkv, weight."""
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return layer, module, kind
