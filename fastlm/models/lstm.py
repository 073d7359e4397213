"""LSTMLM: the recurrent baseline of language modelling (Zaremba et al., arXiv:1409.2329), over the op `lstm`.

Letters of the shapes: B sequences, T tokens, E embedding_dim, H hidden_dim, L num_layers, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.hints import from_fields
from fastlm.models.checks import check_ids
from fastlm.models.config import check_positive_int
from fastlm.nn import Embedding
from fastlm.nn.linear import linear
from fastlm.nn.meta import allocate, without_weights

MODEL_TYPE = "fastlm-lstm"
Hidden = tuple[Tensor, Tensor]  # the hidden states and the cells of all layers, each (L, B, H)


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """The shape of an `LSTMLM`. Raises ValueError for a value out of its range."""

    vocab_size: int = 50257
    embedding_dim: int = 512
    hidden_dim: int = 512
    num_layers: int = 2
    dropout: float = 0.0  # of the embedded tokens, between the layers, and before the head
    tie_embeddings: bool = False  # the head's weight is the token embedding's; needs embedding_dim == hidden_dim
    block_size: int = 64  # tokens between two cuts of backpropagation through time; not a limit of what it reads
    init_std: float = 0.1  # of the embedding

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_dim", "hidden_dim", "num_layers", "block_size"):
            check_positive_int(name, getattr(self, name))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.tie_embeddings and self.embedding_dim != self.hidden_dim:
            raise ValueError(
                f"tie_embeddings needs embedding_dim == hidden_dim, got {self.embedding_dim} and {self.hidden_dim}"
            )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LSTMConfig:
        """The reverse of `to_dict`. An unknown key is an error that names the nearest field."""
        return from_fields(cls, fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return dataclasses.asdict(self)


class LSTMLayer(nn.Module):
    """One layer; parameters as in torch.nn.LSTM, with one bias instead of two (only their sum matters)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, width))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.empty(4 * hidden))

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, E), h0 and c0 (B, H) -> the hidden states (B, T, H) and the last cell (B, H)."""
        gates = linear(x, self.weight_ih, self.bias)  # (B, T, 4H): one product for all steps
        return ops.lstm(gates, h0.to(gates.dtype), c0.to(gates.dtype), self.weight_hh.to(gates.dtype))


class LSTMLM(nn.Module):
    """An LSTM language model.

    >>> model = fastlm.LSTMLM(vocab_size=65, embedding_dim=128, hidden_dim=256, num_layers=2)
    >>> logits, hidden = model(x)              # x (B, T) -> (B, T, V); hidden: two tensors (L, B, H)
    >>> logits, hidden = model(x, hidden)      # go on where the tokens before ended

    Args:
        vocab_size, embedding_dim, hidden_dim, num_layers, and the rest: see `LSTMConfig`.
    """

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int, num_layers: int, **options: Any) -> None:
        super().__init__()
        self.config = config = LSTMConfig(vocab_size, embedding_dim, hidden_dim, num_layers, **options)
        self.gradient_checkpointing = False  # of no effect: the recurrence keeps what it needs
        self.wte = Embedding(vocab_size, embedding_dim)
        widths = [embedding_dim] + [hidden_dim] * (num_layers - 1)
        self.layers = nn.ModuleList(LSTMLayer(width, hidden_dim) for width in widths)
        self.lm_head = None if config.tie_embeddings else nn.Linear(hidden_dim, vocab_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: LSTMConfig) -> LSTMLM:
        """The model of a configuration."""
        return cls(**config.to_dict())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H), as torch.nn.LSTM; the forget gates begin open (bias 1, Jozefowicz et al. 2015)."""
        bound = self.config.hidden_dim**-0.5
        nn.init.normal_(self.wte.weight, std=self.config.init_std)
        for p in self.layers.parameters():
            if p.dim() == 2:
                nn.init.uniform_(p, -bound, bound)
            else:
                nn.init.zeros_(p)
                p[self.config.hidden_dim : 2 * self.config.hidden_dim].fill_(1.0)
        if self.lm_head is not None:
            nn.init.uniform_(self.lm_head.weight, -bound, bound)

    def forward(
        self,
        x: Tensor,
        hidden: Hidden | None = None,
        *,
        targets: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, Hidden]:
        """Logits, or the loss, and the state after the last token.

        Args:
            x: (B, T), token ids, int64 or int32, any T of at least 1.
            hidden: the state after the tokens before x, two tensors (L, B, H); None: zeros.
            targets: (B, T), int64: what each position is to predict; -100 is left out of the loss.
            reduction: of the loss: "mean" over the targets that count, "sum", or "none": (B, T).

        Returns:
            Logits (B, T, V), or with targets the loss in nats (float32, the logits are never held in full); and hidden.
            For truncated backpropagation through time detach it: `hidden = tuple(t.detach() for t in hidden)`.

        Raises:
            ValueError: a wrong shape or dtype, and, on the CPU, a token id out of range.
        """
        states, hidden = self.hidden_states(x, hidden)
        if targets is None:
            return self.logits(states), hidden
        if targets.shape != x.shape:
            raise ValueError(f"targets must have x's shape {tuple(x.shape)}, got {tuple(targets.shape)}")
        return ops.linear_cross_entropy(states, self.head_weight, targets, reduction=reduction), hidden

    def hidden_states(self, x: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """What the head reads, (B, T, H), and the state after the last token."""
        self._check(x, hidden)
        config = self.config
        y = F.dropout(self.wte(x), config.dropout, self.training)
        if hidden is None:
            zeros = y.new_zeros(config.num_layers, x.shape[0], config.hidden_dim)
            hidden = zeros, zeros
        last, cells = [], []
        for layer, h0, c0 in zip(self.layers, *hidden, strict=True):
            y, cell = layer(y, h0, c0)
            last.append(y[:, -1])
            cells.append(cell)
            y = F.dropout(y, config.dropout, self.training)
        return y, (torch.stack(last), torch.stack(cells))

    def logits(self, states: Tensor) -> Tensor:
        """states (..., H) -> logits (..., V)."""
        return linear(states, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The weight of the language-model head, (V, H)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def generate(
        self, idx: Tensor | Sequence[Tensor] | Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Any:
        """Continue the prompts: see `fastlm.generation.generate_recurrent` for the options."""
        from fastlm.generation import generate_recurrent  # generation is built on models: imported when it is called

        return generate_recurrent(self, idx, max_new_tokens, **options)

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """How many numbers are learned; `non_embedding`: without the token table, unless it is tied to the head."""
        count = sum(p.numel() for p in self.parameters())
        return count - (self.wte.weight.numel() if non_embedding and self.lm_head is not None else 0)

    def flops_per_token(self, length: int | None = None) -> float:
        """Floating-point operations of training on one token: 6 for each parameter that is multiplied by."""
        return 6.0 * self.num_parameters(non_embedding=True)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.wte.weight.device

    def save_pretrained(self, path: str | os.PathLike[str], *, format: str = "fastlm") -> None:
        """Write config.json and model.safetensors to a folder, in one step: whole, or what was there before.

        Raises:
            ValueError: a format other than "fastlm": transformers has no LSTM.
        """
        from fastlm.models.folder import save_folder  # it imports Hugging Face's folders, which know this module

        if format != "fastlm":
            raise ValueError(f"an LSTMLM can be saved in the format 'fastlm' only, got {format!r}")
        save_folder(self, path, MODEL_TYPE, self.config.to_dict())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LSTMLM:
        """Load a folder that `save_pretrained` wrote; in evaluation mode.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            ValueError: another kind of model, or a damaged file.
        """
        from fastlm.models.folder import load_weights, read_folder

        config = LSTMConfig.from_dict(read_folder(path, MODEL_TYPE, "fastlm.LSTMLM"))
        with without_weights():
            model = cls.from_config(config)
        load_weights(allocate(model, device), path)
        return model.eval()

    def _check(self, x: Tensor, hidden: Hidden | None) -> None:
        config = self.config
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"x must have shape (B, T) with T at least 1, got {tuple(x.shape)}")
        check_ids(x, config.vocab_size, "x")
        wanted = (config.num_layers, x.shape[0], config.hidden_dim)
        if hidden is not None and any(tuple(t.shape) != wanted for t in hidden):
            got = " and ".join(str(tuple(t.shape)) for t in hidden)
            raise ValueError(f"hidden must be two tensors of shape (L, B, H) = {wanted}, got {got}")
