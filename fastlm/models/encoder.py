"""Encoder: BERT and RoBERTa, the Transformer without the causal mask.

Devlin et al.: BERT (arXiv:1810.04805). Liu et al.: RoBERTa (arXiv:1907.11692). Post-norm blocks, learned positions,
token types. Letters of the shapes: B sequences, T tokens, C = n_embd, V = vocab_size, M tokens to predict.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.models.checks import check_ids
from fastlm.models.encoder_config import EncoderConfig
from fastlm.models.initial import init_normal
from fastlm.nn import MLP, Attention, Embedding, LayerNorm
from fastlm.nn.linear import linear
from fastlm.nn.packing import Padding, packed_positions, padding
from fastlm.ops.linear_cross_entropy import IGNORED

__all__ = ["Encoder", "EncoderConfig"]


class Encoder(nn.Module):
    """A Transformer in which every token sees all others of its sequence.

    >>> model = fastlm.Encoder(fastlm.EncoderConfig.preset("bert-base"))
    >>> hidden = model.hidden_states(idx, attention_mask=mask)  # (B, T, C), zero at padding
    >>> logits, _ = model(idx, attention_mask=mask)             # (B, T, V)
    >>> _, loss = model(idx, targets, attention_mask=mask)      # over the targets that are not -100

    Padding is never computed: a batch with an attention mask is packed into one row, and attention keeps the
    sequences apart.

    Attributes:
        config: the EncoderConfig it was made from.
        gradient_checkpointing: as in `fastlm.GPT`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size + config.position_offset, config.n_embd)
        self.wtt = Embedding(config.type_vocab_size, config.n_embd)
        self.norm = LayerNorm(config.n_embd, config.norm_eps)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layer))
        self.pooler = nn.Linear(config.n_embd, config.n_embd) if config.pooler else None
        self.head = MaskedHead(config) if config.mlm_head else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's start: N(0, 0.02²); biases 0, norms 1."""
        init_normal(self, self.config.init_std)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        token_types: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_logits: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or the loss on the targets.

        Args:
            idx: (B, T), token ids, int64 or int32, T up to block_size.
            targets: (B, T), int64, the token that stood at each place that is to be predicted; -100 elsewhere. The head
                runs at those places alone.
            token_types: (B, T), ids below type_vocab_size; None: all 0.
            attention_mask: (B, T), 1 at tokens, 0 at padding; None: there is no padding.
            cu_seqlens, max_seqlen: several sequences packed into one row, B = 1 (see `fastlm.ops.attention`).
            return_logits: with targets, give all logits too.

        Returns:
            Without targets: logits (B, T, V) and None. With targets: None (or logits) and the mean loss in nats.

        Raises:
            ValueError: shapes or dtypes do not fit, a sequence longer than block_size, an id out of range (on the
                CPU), or there is no head.
        """
        head = self._require_head()
        hidden = self.hidden_states(
            idx, token_types=token_types, attention_mask=attention_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        if targets is None:
            return head.logits(hidden, self.wte.weight), None
        if targets.shape != idx.shape:
            raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}")
        if attention_mask is not None:
            targets = targets.masked_fill(~attention_mask.bool(), IGNORED)
        chosen = (targets != IGNORED).flatten().nonzero().squeeze(1)  # (M)
        loss = head.loss(hidden.flatten(0, 1)[chosen], targets.flatten()[chosen], self.wte.weight)
        return (head.logits(hidden, self.wte.weight) if return_logits else None), loss

    def hidden_states(
        self,
        idx: Tensor,
        *,
        token_types: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The last block's output, (B, T, C); zero at padding. Arguments as for `forward`."""
        check_ids(idx, self.config.vocab_size)
        for name, given in (("token_types", token_types), ("attention_mask", attention_mask)):
            if given is not None and given.shape != idx.shape:
                raise ValueError(f"{name} must have idx's shape {tuple(idx.shape)}, got {tuple(given.shape)}")
        padded = None
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give attention_mask (a padded batch) or cu_seqlens (a packed one), not both")
            padded = padding(attention_mask)
            idx = padded.pack(idx)
            token_types = None if token_types is None else padded.pack(token_types)
            cu_seqlens, max_seqlen = padded.cu_seqlens, padded.max_seqlen
        self._check_length(idx, cu_seqlens, max_seqlen)
        h = self._embed(idx, token_types, self._positions(idx, cu_seqlens, padded))
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen if cu_seqlens is not None else None,
        }
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False, **options) if recompute else block(h, **options)
        return h if padded is None else padded.unpack(h)

    def _embed(self, idx: Tensor, token_types: Tensor | None, positions: Tensor) -> Tensor:
        types = self.wtt.weight[0] if token_types is None else self.wtt(token_types)
        h = self.norm(self.wte(idx) + types + self.wpe(positions))  # (B, T, C)
        return F.dropout(h, self.config.dropout, self.training)

    def _positions(self, idx: Tensor, cu_seqlens: Tensor | None, padded: Padding | None) -> Tensor:
        """Rows of the position table. In a padded batch BERT counts the columns, RoBERTa the tokens."""
        if padded is not None and self.config.layout == "bert":
            positions = padded.where % padded.shape[1] if padded.shape[1] else padded.where
        elif cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, idx.shape[1])[1]
        else:
            positions = torch.arange(idx.shape[1], device=idx.device)
        return positions + self.config.position_offset

    def _check_length(self, idx: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
        if cu_seqlens is not None and idx.shape[0] != 1:
            raise ValueError(f"packed sequences (cu_seqlens) need idx of shape (1, T), got {tuple(idx.shape)}")
        longest = idx.shape[1] if cu_seqlens is None or max_seqlen is None else max_seqlen
        if longest > self.config.block_size:
            raise ValueError(f"a sequence of {longest} tokens is longer than block_size = {self.config.block_size}")

    def _require_head(self) -> MaskedHead:
        if self.head is None:
            raise ValueError(
                "this encoder has no head for masked prediction (the folder that it came from had none); "
                "use hidden_states, or make one with EncoderConfig(mlm_head=True)"
            )
        return self.head

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Encoder:
        """Load a folder of BERT or RoBERTa: see `fastlm.models.huggingface.encoder_from_pretrained`."""
        from fastlm.models.huggingface import encoder_from_pretrained

        return encoder_from_pretrained(path, **options)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that transformers loads: see `fastlm.models.huggingface.save_pretrained`."""
        from fastlm.models.huggingface import save_pretrained

        save_pretrained(self, path, **options)

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """How many numbers are learned; `non_embedding` leaves out the tables that are only looked up."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            count -= self.wpe.weight.numel() + self.wtt.weight.numel()
            count -= self.wte.weight.numel() if self.head is None else 0
        return count

    def flops_per_token(self, length: int | None = None) -> float:
        """Floating-point operations of training on one token of a sequence of `length`: as `GPT.flops_per_token`.

        The head is counted at 15 % of the tokens: it runs only where a token is to be predicted.
        """
        head = 0 if self.head is None else self.wte.weight.numel() + self.head.dense.weight.numel()
        attention = 12 * self.config.n_layer * self.config.n_embd * (length or self.config.block_size)
        return 6 * (self.num_parameters(non_embedding=True) - 0.85 * head) + attention

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.wte.weight.device


class EncoderBlock(nn.Module):
    """Attention and MLP, each with a norm behind its residual addition."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention = Attention(
            config.n_embd,
            config.n_head,
            causal=False,
            dropout=config.attention_dropout_p,
        )
        self.norm_1 = LayerNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config.n_embd, config.mlp_size, config.activation)
        self.norm_2 = LayerNorm(config.n_embd, config.norm_eps)

    def forward(self, h: Tensor, **packing: Any) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        branch = F.dropout(self.attention(h, **packing), self.dropout, self.training)
        h, _ = self.norm_1(branch, residual=h)
        branch = F.dropout(self.mlp(h), self.dropout, self.training)
        h, _ = self.norm_2(branch, residual=h)
        return h


class MaskedHead(nn.Module):
    """A dense layer, its activation, a norm, and the token embedding's weight with a bias of its own."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation = config.masked_activation
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.norm = LayerNorm(config.n_embd, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, C) -> (…, C): what the embeddings are compared with."""
        return self.norm(ops.linear_act(hidden, self.dense.weight, self.dense.bias, activation=self.activation))

    def logits(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(…, C) -> (…, V)"""
        return linear(self(hidden), embedding, self.bias)

    def loss(self, hidden: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
        """Mean cross-entropy over hidden (M, C) and targets (M), the logits never held in full.

        The op has no bias: it is a further column of the weight, beside a one in the input. Seven columns of zeros
        more keep the rows aligned for the kernels.
        """
        x = self(hidden)
        ones = F.pad(x.new_ones(len(x), 1), (0, 7))
        weight = torch.cat((embedding, F.pad(self.bias[:, None], (0, 7))), dim=1)
        return ops.linear_cross_entropy(torch.cat((x, ones), dim=1), weight, targets)
