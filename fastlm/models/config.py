"""GPTConfig: the shape and the options of a model, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastlm.hints import did_you_mean, from_fields
from fastlm.nn.mlp import ACTIVATIONS, GATED
from fastlm.nn.rotary import RopeScaling

NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("learned", "sinusoidal", "rotary", "alibi")


@dataclass(frozen=True)
class GPTConfig:
    """The shape and the options of a `fastlm.GPT`. The defaults are GPT-2 124M.

    Fields that may be None follow from others; what they come to is `kv_heads`, `head_size`, `mlp_size`,
    `attention_dropout_p` and `embedding_dropout_p`. So `dataclasses.replace(config, n_embd=512)` does what it says.

    Raises:
        ValueError: a value is out of its range, or two do not fit together; the message names both.
    """

    vocab_size: int = 50257
    block_size: int = 1024  # the longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # heads of keys and values; fewer than n_head is GQA, 1 is MQA; None: n_head
    n_embd: int = 768
    head_dim: int | None = None  # None: n_embd / n_head
    intermediate_size: int | None = None  # width inside the MLP; None: 4 n_embd, or, gated, 8/3 n_embd

    dropout: float = 0.0  # of the two branches of a block
    attention_dropout: float | None = None  # of the attention weights; None: dropout
    embedding_dropout: float | None = None  # of the embedded tokens; None: dropout

    bias: bool = True  # in every linear layer and layer norm, unless one of the next four says otherwise
    norm_bias: bool | None = None  # layer norms (RMS norm has none)
    qkv_bias: bool | None = None  # the projection to queries, keys and values
    attention_bias: bool | None = None  # attention's output projection
    mlp_bias: bool | None = None  # both linear layers of the MLP

    norm: str = "layer_norm"  # or "rms_norm"
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMS norm over each head's queries and keys, before rotary positions (arXiv:2302.05442)
    activation: str = "gelu_tanh"  # gelu_tanh, gelu, relu, relu2, silu, or gated: swiglu, geglu

    position: str = "learned"  # or "sinusoidal", "rotary", "alibi"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # a dict of its fields becomes a RopeScaling

    sliding_window: int | None = None  # a token sees this many tokens, itself included; None: all before it
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # c tanh(score / c) on the attention scores, 0: none
    logit_softcap: float = 0.0  # c tanh(logit / c) on the logits, 0: none

    tie_embeddings: bool = True  # the head's weight is the token embedding's
    init_std: float = 0.02

    @property
    def kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """The width inside the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        # A gated MLP has three matrices instead of two: 8/3 keeps the number of parameters (arXiv:2002.05202). The
        # width is rounded up to a multiple of 64, which kernels like.
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.activation in GATED else 4 * self.n_embd

    @property
    def attention_dropout_p(self) -> float:
        """The probability of dropout on the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def embedding_dropout_p(self) -> float:
        """The probability of dropout on the embedded tokens."""
        return self.dropout if self.embedding_dropout is None else self.embedding_dropout

    def has_bias(self, where: str) -> bool:
        """Whether the layers of one kind have a bias: where is "norm", "qkv", "attention" or "mlp"."""
        own = getattr(self, f"{where}_bias")
        return self.bias if own is None else own

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """A named configuration, with changes: `GPTConfig.preset("gpt2", dropout=0.1)`. The names are in `PRESETS`."""
        from fastlm.models.presets import PRESETS

        if name not in PRESETS:
            hint = did_you_mean(name, PRESETS)
            raise ValueError(f"there is no preset {name!r}{hint}; the presets are: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GPTConfig:
        """The reverse of `to_dict`. An unknown key is an error that names the nearest field."""
        return from_fields(cls, fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that JSON and TOML can hold."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        rope_scaling: Any = self.rope_scaling  # a dict where the fields come from JSON or TOML
        if isinstance(rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(rope_scaling))
        elif rope_scaling is not None and not isinstance(rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling must be a RopeScaling, a dict of its fields or None, got {rope_scaling!r}")
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            check_positive_int(name, getattr(self, name))
        for name in ("n_kv_head", "head_dim", "intermediate_size", "sliding_window"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_choice("norm", self.norm, NORMS)
        check_choice("position", self.position, POSITIONS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}), or head_dim must be given"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head dimension, got {self.head_size}")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, got {self.n_embd}")
        if self.rope_scaling is not None and self.position != "rotary":
            raise ValueError(f"rope_scaling needs position='rotary', got position={self.position!r}")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and not self.rope_theta > 1.0:
            raise ValueError(f"rope_scaling of kind yarn needs a rope_theta above 1, got {self.rope_theta}")
        if self.norm == "rms_norm" and self.norm_bias:
            raise ValueError("norm='rms_norm' has no bias, got norm_bias=True")
        for name in ("dropout", "attention_dropout", "embedding_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        for name in ("attention_softcap", "logit_softcap"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must not be negative (0 is none), got {getattr(self, name)}")
        for name in ("norm_eps", "rope_theta", "init_std", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive, got {value}")


def check_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}{did_you_mean(value, choices)}")
