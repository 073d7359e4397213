"""EncoderConfig: the shape and the options of an encoder, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastlm.hints import did_you_mean, from_fields
from fastlm.models.config import check_choice, check_positive_int
from fastlm.nn.mlp import ACTIVATIONS, GATED

LAYOUTS = ("bert", "roberta")

# The shapes of the published models (their config.json), and two small ones with the shapes of GPT's nano and micro.
ENCODER_PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"vocab_size": 257, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "mask_token_id": 256},
    "micro": {"vocab_size": 257, "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "mask_token_id": 256},
    "minilm-l6": {"vocab_size": 30522, "n_layer": 6, "n_head": 12, "n_embd": 384, "intermediate_size": 1536},
    "bert-base": {"vocab_size": 30522},
    "bert-large": {"vocab_size": 30522, "n_layer": 24, "n_head": 16, "n_embd": 1024},
    "roberta-base": {"vocab_size": 50265, "layout": "roberta", "type_vocab_size": 1, "norm_eps": 1e-5},
}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape and the options of a `fastlm.Encoder`. The defaults are BERT-base.

    Raises:
        ValueError: a value is out of its range, or two do not fit together; the message names both.
    """

    vocab_size: int = 30522
    block_size: int = 512  # the longest sequence, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    intermediate_size: int | None = None  # width inside the MLP; None: 4 n_embd
    type_vocab_size: int = 2  # kinds of tokens: BERT's first and second sentence
    layout: str = "bert"  # or "roberta": positions begin at 2, and folders have RoBERTa's names

    dropout: float = 0.0  # of the embeddings and of the two branches of a block
    attention_dropout: float | None = None  # of the attention weights; None: dropout
    norm_eps: float = 1e-12
    activation: str = "gelu"
    head_activation: str | None = None  # of the head; None: activation. transformers' RoBERTa has gelu
    init_std: float = 0.02

    mlm_head: bool = True  # what predicts the tokens left out
    pooler: bool = False  # BERT's dense layer over the first token; fastlm keeps it, and does not use it
    mask_token_id: int | None = None  # what stands in the place of a token left out; None: the tokenizer's

    @property
    def mlp_size(self) -> int:
        """The width inside the MLP."""
        return 4 * self.n_embd if self.intermediate_size is None else self.intermediate_size

    @property
    def attention_dropout_p(self) -> float:
        """The probability of dropout on the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def masked_activation(self) -> str:
        """The activation of the head for masked prediction."""
        return self.activation if self.head_activation is None else self.head_activation

    @property
    def position_offset(self) -> int:
        """The row of the first position in the table: RoBERTa's begins after its padding token's."""
        return 2 if self.layout == "roberta" else 0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> EncoderConfig:
        """A named configuration, with changes. The names are in `ENCODER_PRESETS`."""
        if name not in ENCODER_PRESETS:
            known = ", ".join(ENCODER_PRESETS)
            hint = did_you_mean(name, ENCODER_PRESETS)
            raise ValueError(f"there is no preset {name!r}{hint}; the presets are: {known}")
        return cls.from_dict({**ENCODER_PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EncoderConfig:
        """The reverse of `to_dict`. An unknown key is an error that names the nearest field."""
        return from_fields(cls, fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values that JSON and TOML can hold."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "type_vocab_size"):
            check_positive_int(name, getattr(self, name))
        if self.intermediate_size is not None:
            check_positive_int("intermediate_size", self.intermediate_size)
        check_choice("layout", self.layout, LAYOUTS)
        for name, activation in (("activation", self.activation), ("head_activation", self.masked_activation)):
            check_choice(name, activation, tuple(a for a in ACTIVATIONS if a not in GATED))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id must be 0 to {self.vocab_size - 1}, got {self.mask_token_id}")
