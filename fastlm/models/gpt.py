"""GPT: GPT-2 and the Llama family as configurations of one model.

Pre-norm transformer decoder (Radford et al. 2019; Touvron et al., arXiv:2302.13971). Letters of the shapes:
B sequences, T tokens, C = n_embd, H heads, D head dimension, V = vocab_size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm import ops
from fastlm.models.checks import check_ids
from fastlm.models.config import GPTConfig
from fastlm.models.initial import init_normal
from fastlm.nn import MLP, Attention, Cache, Embedding, LayerNorm, RMSNorm, Rotary, Sinusoidal, alibi_slopes
from fastlm.nn.computed import Computed
from fastlm.nn.linear import linear
from fastlm.nn.packing import packed_positions
from fastlm.ops.embedding.tied import tied_embedding

__all__ = ["GPT", "Block", "GPTConfig"]


class GPT(nn.Module):
    """A GPT language model.

    >>> model = fastlm.GPT(fastlm.GPTConfig.preset("gpt2"))
    >>> logits, _ = model(idx)                 # idx (B, T) -> (B, T, V)
    >>> _, loss = model(idx, targets)          # the fused loss: logits are never held in full

    Attributes:
        config: the GPTConfig it was made from.
        gradient_checkpointing: set to True, the backward pass computes each block again instead of keeping its
            activations: about a third more time, and memory for one block instead of n_layer.
        read_from: the model_type of the folder that it was read from ("phi3"), None for a new one.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.read_from: str | None = None
        self.embedding_dropout = config.embedding_dropout_p
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.sinusoidal = Sinusoidal(config.n_embd) if config.position == "sinusoidal" else None
        self.rotary = (
            Rotary(config.head_size, config.rope_theta, config.rope_scaling) if config.position == "rotary" else None
        )
        self.alibi = Computed(partial(alibi_slopes, config.n_head)) if config.position == "alibi" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = _norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's start: N(0, 0.02²), divided by sqrt(2 n_layer) into the residual stream; biases 0, norms 1."""
        std = self.config.init_std
        init_normal(self, std, into_residual=std / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        return_logits: bool = False,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or the loss.

        Args:
            idx: (B, T), token ids, int64 or int32, T up to block_size.
            targets: (B, T), int64, what each position is to predict (idx one place on); -100 is left out of the loss.
            return_logits: with targets, give the logits too (they take B T V numbers of memory).
            reduction: "mean" over the targets that count, "sum", or "none": the losses, (B, T).
            label_smoothing, z_loss: as in `fastlm.ops.linear_cross_entropy`.
            cu_seqlens, max_seqlen: several sequences packed into one row, B = 1: (N + 1) int32 offsets of their starts
                with the total at the end, and the length of the longest (default: T). Each sees only itself and
                starts at position 0.
            cache: keys and values of the tokens before idx (see `fastlm.generation.cache`); those of idx are added.

        Returns:
            Without targets: logits (B, T, V) and None. With targets: None (or logits) and the loss in nats, float32.

        Raises:
            ValueError: a wrong shape or dtype, a sequence longer than block_size, and, on the CPU, a token id out of
                range. On a GPU looking at the ids would stop the stream: there its embedding is NaN, and so is the
                loss.
            IndexError: on the CPU, a target out of range (on a GPU its loss is NaN).
        """
        if targets is None:
            hidden = self.hidden_states(idx, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cache=cache)
            return self.logits(hidden), None
        if targets.shape != idx.shape:
            raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}")
        self._check(idx, cu_seqlens, max_seqlen, cache)
        if self.lm_head is None and type(self.wte) is Embedding and not _has_hooks(self.wte):
            tokens, head_weight = tied_embedding(idx, self.wte.weight)
        else:
            tokens, head_weight = self.wte(idx), self.head_weight
        hidden = self._transform(tokens, cu_seqlens, max_seqlen, cache)
        loss = ops.linear_cross_entropy(
            hidden,
            head_weight,
            targets,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=self.config.logit_softcap,
        )
        return (self.logits(hidden) if return_logits else None), loss

    def hidden_states(
        self,
        idx: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The last block's output after the final norm, (B, T, C): what the head reads. Arguments as for `forward`."""
        self._check(idx, cu_seqlens, max_seqlen, cache)
        return self._transform(self.wte(idx), cu_seqlens, max_seqlen, cache)

    def _transform(
        self, tokens: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: Cache | None
    ) -> Tensor:
        """The embeddings of the tokens, (B, T, C) -> the hidden states."""
        positions = self._positions(tokens, cu_seqlens, cache)  # (T) or (B, T)
        h = F.dropout(self._place(tokens, positions), self.embedding_dropout, self.training)

        options: dict[str, Any] = {
            "rotation": None if self.rotary is None else self.rotary(positions),
            "alibi_slopes": None if self.alibi is None else self.alibi.value,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "cache": cache,
        }
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        branch: Tensor | None = None  # the output of the branch that is not yet added to the residual stream h
        for block in self.blocks:
            if recompute:
                branch, h = checkpoint(block, branch, h, use_reentrant=False, **options)
            else:
                branch, h = block(branch, h, **options)
        if cache is not None:
            cache.advance(tokens.shape[1])
        y, _ = self.norm(branch, residual=h)
        return y

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Token ids (B, T) and positions (T) or (B, T) -> (B, T, C), the start of the residual stream."""
        return self._place(self.wte(idx), positions)

    def _place(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`embed`, from the embeddings of the tokens."""
        h = tokens
        if self.wpe is not None:
            h = h + self.wpe(positions)
        if self.sinusoidal is not None:  # the embedding is scaled up to the sinusoids, as in their paper, section 3.4
            h = h * math.sqrt(self.config.n_embd) + self.sinusoidal(positions).to(h.dtype)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        return self.capped(linear(hidden, self.head_weight))

    def capped(self, logits: Tensor) -> Tensor:
        """What the head gives, (..., V), with the soft cap where the model has one."""
        cap = self.config.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    @property
    def head_weight(self) -> Tensor:
        """The weight of the language-model head, (V, C)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def generate(
        self, idx: Tensor | Sequence[Tensor] | Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Any:
        """Continue the prompts by up to `max_new_tokens` tokens: see `fastlm.generation.generate` for the options."""
        from fastlm.generation import generate  # generation is built on models: imported when it is called

        return generate(self, idx, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> GPT:
        """Load a folder of config.json and safetensors: see `fastlm.models.huggingface.from_pretrained`."""
        from fastlm.models.huggingface import from_pretrained

        return from_pretrained(path, **options)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that transformers loads: see `fastlm.models.huggingface.save_pretrained`."""
        from fastlm.models.huggingface import save_pretrained

        save_pretrained(self, path, **options)

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """How many numbers are learned.

        Args:
            non_embedding: leave out the tables that are only looked up: positions, and tokens unless tied to the head.
        """
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            count -= 0 if self.wpe is None else self.wpe.weight.numel()
            count -= 0 if self.lm_head is None else self.wte.weight.numel()
        return count

    def flops_per_token(self, length: int | None = None) -> float:
        """Floating-point operations of training (forward and backward) on one token of a sequence of `length`.

        6 N + 12 n_layer H D T (Chowdhery et al., arXiv:2204.02311, appendix B): N the parameters without the tables
        that are only looked up; attention counts in full, as if it were not causal (a sliding window counts). The
        forward pass is a third.
        """
        seen = length or self.config.block_size
        if self.config.sliding_window is not None:
            seen = min(seen, self.config.sliding_window)
        attention = 12 * self.config.n_layer * self.config.n_head * self.config.head_size * seen
        return float(6 * self.num_parameters(non_embedding=True) + attention)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.wte.weight.device

    def _positions(self, tokens: Tensor, cu_seqlens: Tensor | None, cache: Cache | None) -> Tensor:
        length = tokens.shape[1]
        if cache is not None:
            return cache.positions(length, tokens.device)
        positions = torch.arange(length, device=tokens.device)
        if cu_seqlens is not None:  # each sequence starts at 0
            positions = packed_positions(cu_seqlens, length)[1]
        return positions

    def _check(self, idx: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: Cache | None) -> None:
        check_ids(idx, self.config.vocab_size)
        longest = idx.shape[1] + (0 if cache is None else cache.length)
        if cu_seqlens is not None:
            if idx.shape[0] != 1 or cache is not None:
                raise ValueError(
                    f"packed sequences (cu_seqlens) need idx of shape (1, T) and no cache; got {tuple(idx.shape)} and "
                    f"{'no' if cache is None else 'a'} cache"
                )
            longest = longest if max_seqlen is None else max_seqlen
        if longest > self.config.block_size:
            raise ValueError(f"a sequence of {longest} tokens is longer than block_size = {self.config.block_size}")


class Block(nn.Module):
    """Attention and MLP, each behind a norm. The residual additions are part of the norms that follow them."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.norm_1 = _norm(config)
        self.attention = Attention(
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_size,
            qkv_bias=config.has_bias("qkv"),
            proj_bias=config.has_bias("attention"),
            scale=config.attention_scale,
            window=None if config.sliding_window is None else (config.sliding_window - 1, 0),
            softcap=config.attention_softcap,
            dropout=config.attention_dropout_p,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.norm_2 = _norm(config)
        self.mlp = MLP(config.n_embd, config.mlp_size, config.activation, bias=config.has_bias("mlp"))

    def forward(self, branch: Tensor | None, h: Tensor, **attention_options: Any) -> tuple[Tensor, Tensor]:
        """branch: the output (B, T, C) of the block before, not yet added to h (B, T, C); None in the first block."""
        if branch is None:
            y = self.norm_1(h)
        else:
            y, h = self.norm_1(branch, residual=h)
        branch = F.dropout(self.attention(y, layer=self.layer, **attention_options), self.dropout, self.training)
        y, h = self.norm_2(branch, residual=h)
        return F.dropout(self.mlp(y), self.dropout, self.training), h


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    if config.norm == "rms_norm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.norm_eps, config.has_bias("norm"))
