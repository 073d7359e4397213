"""config.json of GPT-2, Llama, Mistral, Qwen2 and Qwen3, and GPTConfig: each from the other; of Phi-3, read only.

What a config asks for and fastlm does not have is an error here, never left out: the logits would be others.
"""

from __future__ import annotations

import math
from typing import Any

from fastlm.models.config import GPTConfig
from fastlm.models.huggingface.activations import ACTIVATIONS, written_activation
from fastlm.models.huggingface.encoder_configs import ENCODERS
from fastlm.nn.rotary import RopeScaling

Fields = dict[str, Any]

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SUPPORTED = ("gpt2", *LLAMA_FAMILY, "fastlm")

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_from_huggingface(fields: Fields) -> GPTConfig:
    """The GPTConfig of a config.json.

    Raises:
        ValueError: an architecture that fastlm does not have, or an option of one that it does not have.
    """
    kind = fields.get("model_type")
    if kind in ENCODERS:
        raise ValueError(
            f"this folder holds model_type {kind!r}, a masked model (fastlm.Encoder); a causal one is wanted here: "
            f"{', '.join(SUPPORTED)}"
        )
    if kind not in SUPPORTED:
        got = f"model_type {kind!r}" if kind else f"no model_type (architectures: {fields.get('architectures')})"
        raise ValueError(f"this folder holds {got}; fastlm loads: {', '.join(SUPPORTED)}")
    if fields.get("quantization_config"):
        raise ValueError(
            "these weights are quantised (config.json has quantization_config); fastlm loads floating point"
        )
    try:
        if kind == "fastlm":
            return GPTConfig.from_dict(fields["config"])
        if not fields.get("is_causal", True):
            raise ValueError(f"config.json asks for is_causal={fields['is_causal']!r}; fastlm.GPT is causal")
        return _from_gpt2(fields) if kind == "gpt2" else _from_llama(fields, kind)
    except KeyError as error:
        raise ValueError(f"config.json of model_type {kind!r} lacks the field {error}") from None


def config_to_huggingface(config: GPTConfig) -> Fields:
    """The config.json of the architecture that computes what this configuration does.

    Raises:
        ValueError: there is none among GPT-2, Llama, Mistral, Qwen2 and Qwen3; the message says what they lack.
    """
    kind, obstacles = _obstacles(config)
    if obstacles:
        raise ValueError(
            f"transformers' {kind} cannot express this model ({'; '.join(obstacles)}); save it with format='fastlm'"
        )
    fields = _to_gpt2(config) if kind == "gpt2" else _to_llama(config, kind)
    # Token ids of begin and end belong to the tokenizer; transformers' defaults would be those of its own vocabulary.
    ids = {"bos_token_id": None, "eos_token_id": None}
    return {"model_type": kind, "architectures": [_ARCHITECTURES[kind]]} | ids | fields


_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # transformers' defaults; Llama's is the number of heads


# Other names of GPT-2's fields; where both stand, these count.
_GENERIC = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _from_gpt2(fields: Fields) -> GPTConfig:
    fields = {**fields, **{own: fields[generic] for generic, own in _GENERIC.items() if generic in fields}}
    _refuse(fields, "add_cross_attention", "scale_attn_by_inverse_layer_idx")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_function {activation!r} is not one of: {', '.join(ACTIVATIONS)}")
    return GPTConfig(
        vocab_size=fields["vocab_size"],
        block_size=fields["n_positions"],
        n_layer=fields["n_layer"],
        n_head=fields["n_head"],
        n_embd=fields["n_embd"],
        intermediate_size=fields.get("n_inner"),
        dropout=fields.get("resid_pdrop", 0.1),
        attention_dropout=fields.get("attn_pdrop", 0.1),
        embedding_dropout=fields.get("embd_pdrop", 0.1),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=ACTIVATIONS[activation],
        attention_scale=None if fields.get("scale_attn_weights", True) else 1.0,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        init_std=fields.get("initializer_range", 0.02),
    )


def _from_llama(fields: Fields, kind: str) -> GPTConfig:
    activation = fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported for {kind}, only silu")
    theta, scaling = _rope(fields)
    own_bias = bool(fields.get("attention_bias", False)) and kind in ("llama", "qwen3")
    return GPTConfig(
        vocab_size=fields["vocab_size"],
        block_size=fields["max_position_embeddings"],
        n_layer=fields["num_hidden_layers"],
        n_head=fields["num_attention_heads"],
        n_kv_head=fields.get("num_key_value_heads", _KV_HEADS.get(kind)),
        n_embd=fields["hidden_size"],
        head_dim=fields.get("head_dim", 128 if kind == "qwen3" else None),
        intermediate_size=fields["intermediate_size"],
        dropout=fields.get("resid_pdrop", 0.0) if kind == "phi3" else 0.0,
        attention_dropout=fields.get("attention_dropout", 0.0),
        embedding_dropout=0.0,  # transformers has none here, whatever Phi-3's embd_pdrop is
        bias=False,
        qkv_bias=own_bias or kind == "qwen2",
        attention_bias=own_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)) and kind == "llama",
        norm="rms_norm",
        norm_eps=fields.get("rms_norm_eps", 1e-5 if kind == "phi3" else 1e-6),
        qk_norm=kind == "qwen3",
        activation="swiglu",
        position="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_sliding_window(fields, kind),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """The base and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    What stands twice is taken as transformers does: `rope_scaling` before `rope_parameters`, the dict's theta before
    the one beside it, but the original length beside the dict before the dict's.
    """
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    # what Phi-3 calls yarn is something else
    known = ["default"] if fields["model_type"] == "phi3" else ["default", "llama3", "linear", "yarn"]
    if kind not in known or partial not in (None, 1.0):
        raise ValueError(
            f"rotary positions of type {kind!r} with partial_rotary_factor {partial} are not supported; "
            f"fastlm has the types {', '.join(known)} for {fields['model_type']}, over the whole head"
        )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    length = "original_max_position_embeddings"
    original = int(fields.get(length) or rope.get(length) or fields["max_position_embeddings"])
    if kind == "yarn":
        return theta, _yarn(rope, original, fields["max_position_embeddings"])
    return theta, RopeScaling(
        "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original
    )


def _yarn(rope: Fields, original: int, block_size: int) -> RopeScaling:
    if not rope.get("truncate", True):
        raise ValueError("yarn with truncate = false is not supported")
    factor = float(rope.get("factor") or block_size / original)
    magnitude = rope.get("attention_factor")
    if magnitude is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        per_unit = 0.1 * math.log(factor)
        magnitude = (per_unit * rope["mscale"] + 1) / (per_unit * rope["mscale_all_dim"] + 1)
    return RopeScaling(
        "yarn",
        factor,
        original_block_size=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=None if magnitude is None else float(magnitude),
    )


def _sliding_window(fields: Fields, kind: str) -> int | None:
    if kind in ("mistral", "phi3"):
        return fields.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind not in ("qwen2", "qwen3") or not fields.get("use_sliding_window"):
        return None
    first = fields.get("max_window_layers", 28)
    computed = ["full_attention" if i < first else "sliding_attention" for i in range(fields["num_hidden_layers"])]
    types = set(fields.get("layer_types") or computed)
    if len(types) > 1:
        raise ValueError(
            f"{kind} with a sliding window in some layers only is not supported: max_window_layers = {first}, "
            f"layer_types = {fields.get('layer_types')}"
        )
    return fields.get("sliding_window", 4096) if types == {"sliding_attention"} else None


def _refuse(fields: Fields, *names: str) -> None:
    for name in names:
        if fields.get(name):
            raise ValueError(f"config.json asks for {name}={fields[name]!r}, which fastlm does not have")


def _obstacles(config: GPTConfig) -> tuple[str, list[str]]:
    """The architecture that comes nearest, and what keeps it from expressing the configuration."""
    biases = tuple(config.has_bias(where) for where in ("qkv", "attention", "mlp"))
    kind = "gpt2"
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [("attention_softcap", config.attention_softcap, (0.0,))]
    wanted += [("logit_softcap", config.logit_softcap, (0.0,))]
    if config.position != "rotary":
        wanted += [
            ("position", config.position, ("learned",)),
            ("norm", config.norm, ("layer_norm",)),
            ("activation", config.activation, tuple(dict.fromkeys(ACTIVATIONS.values()))),
            ("n_kv_head", config.kv_heads, (config.n_head,)),
            ("n_head * head_dim", config.n_head * config.head_size, (config.n_embd,)),
            ("sliding_window", config.sliding_window, (None,)),
            ("attention_scale", config.attention_scale, (None, 1.0)),
            ("qk_norm", config.qk_norm, (False,)),
        ]
    else:
        if config.qk_norm:
            kind = "qwen3"
        else:
            kind = "qwen2" if biases == (True, False, False) else "mistral" if config.sliding_window else "llama"
        allowed = {
            "llama": ((True, True, True), (True, True, False), (False, False, True), (False, False, False)),
            "mistral": ((False, False, False),),
            "qwen2": ((True, False, False),),
            "qwen3": ((True, True, False), (False, False, False)),
        }
        wanted += [
            ("norm", config.norm, ("rms_norm",)),
            ("activation", config.activation, ("swiglu",)),
            ("attention_scale", config.attention_scale, (None,)),
            ("biases of (qkv, attention, mlp)", biases, allowed[kind]),
        ]
        if kind == "llama":
            wanted.append(("n_embd modulo n_head", config.n_embd % config.n_head, (0,)))
    return kind, [
        f"{name} is {got!r}, not {' or '.join(map(repr, choices))}"
        for name, got, choices in wanted
        if got not in choices
    ]


def _to_gpt2(config: GPTConfig) -> Fields:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.intermediate_size,
        "activation_function": written_activation(config.activation),
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.embedding_dropout_p,
        "attn_pdrop": config.attention_dropout_p,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _to_llama(config: GPTConfig, kind: str) -> Fields:
    fields: Fields = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "attention_dropout": config.attention_dropout_p,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _to_rope_scaling(config.rope_scaling),
    }
    if config.head_dim is not None or kind == "qwen3":  # Qwen3's default is 128
        fields["head_dim"] = config.head_size
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = config.has_bias("attention")
    if kind == "llama":
        fields["mlp_bias"] = config.has_bias("mlp")
    else:
        fields["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return fields


def _to_rope_scaling(scaling: RopeScaling | None) -> Fields | None:
    if scaling is None:
        return None
    fields: Fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_block_size,
        }
    if scaling.kind == "yarn":
        fields |= {
            "original_max_position_embeddings": scaling.original_block_size,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return fields
