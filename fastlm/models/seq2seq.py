"""EncoderDecoder: the Transformer of Vaswani et al. (arXiv:1706.03762), pre-norm, over the same ops as `fastlm.GPT`.

Letters of the shapes: B pairs, S source tokens, T target tokens, C = n_embd, H heads, D head dimension, V = vocab_size.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.models.checks import check_ids
from fastlm.models.config import GPTConfig
from fastlm.models.gpt import Block, _norm
from fastlm.models.initial import init_normal
from fastlm.nn import MLP, Attention, Cache, Embedding
from fastlm.nn.linear import Linear, linear

MODEL_TYPE = "fastlm-seq2seq"
Memory = list[tuple[Tensor, Tensor]]  # for each layer of the decoder the source's keys and values (B, S, H, D)


class CrossAttention(nn.Module):
    """The target's tokens attend to all of the source's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.attention_dropout_p
        self.q = Linear(config.n_embd, config.n_embd, bias=config.has_bias("qkv"))
        self.kv = Linear(config.n_embd, 2 * config.n_embd, bias=config.has_bias("qkv"))
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.has_bias("attention"))

    def memory(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, S, C) -> keys and values (B, S, H, D)."""
        k, v = self.kv(source).unflatten(-1, (2 * self.n_head, -1)).chunk(2, 2)
        return k, v

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        q = self.q(x).unflatten(-1, (self.n_head, -1))  # (B, T, H, D)
        y = ops.attention(q, *memory, causal=False, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.flatten(2))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the source, and the MLP, each behind a norm."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.norm_1, self.norm_2, self.norm_3 = _norm(config), _norm(config), _norm(config)
        self.attention = Attention(
            config.n_embd,
            config.n_head,
            qkv_bias=config.has_bias("qkv"),
            proj_bias=config.has_bias("attention"),
            dropout=config.attention_dropout_p,
        )
        self.cross = CrossAttention(config)
        self.mlp = MLP(config.n_embd, config.mlp_size, config.activation, bias=config.has_bias("mlp"))

    def forward(
        self, branch: Tensor | None, h: Tensor, memory: tuple[Tensor, Tensor], cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """branch: the output of the block before, not yet added to h; None in the first block."""
        if branch is None:
            y = self.norm_1(h)
        else:
            y, h = self.norm_1(branch, residual=h)
        branch = F.dropout(self.attention(y, cache=cache, layer=self.layer), self.dropout, self.training)
        y, h = self.norm_2(branch, residual=h)
        branch = F.dropout(self.cross(y, memory), self.dropout, self.training)
        y, h = self.norm_3(branch, residual=h)
        return F.dropout(self.mlp(y), self.dropout, self.training), h


class EncoderDecoder(nn.Module):
    """An encoder reads the source in both directions, a decoder writes the target and looks at all of the source.

    >>> _, loss = model(x, y, source=source)   # source (B, S), x and y (B, T): the loss of predicting y from x

    Args:
        config: of both halves: n_layer blocks in each, learned positions, one token table for source, target and head.
            Options that only a GPT has (rotary positions, grouped heads, windows, caps) are refused.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.gradient_checkpointing = False  # of no effect: sentences are short
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.source_positions = Embedding(config.block_size, config.n_embd)
        self.target_positions = Embedding(config.block_size, config.n_embd)
        self.encoder = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        for block in self.encoder:
            block.attention.causal = False  # type: ignore[union-attr]
        self.encoder_norm = _norm(config)
        self.decoder = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.n_layer))
        self.norm = _norm(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `fastlm.GPT`: N(0, init_std²), smaller into the residual stream; biases 0, norms 1."""
        std = self.config.init_std
        init_normal(self, std, into_residual=std / math.sqrt(3 * self.config.n_layer))

    def forward(self, x: Tensor, y: Tensor | None = None, *, source: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) and None; with targets y (B, T), -100 left out, None and the mean loss in nats.

        Args:
            x: (B, T), the target's tokens so far; padding at the end is harmless where y leaves it out.
            source: (B, S), without padding: the sources of a batch have one length.

        Raises:
            ValueError: a wrong shape or dtype, a sentence longer than block_size, and, on the CPU, a token id out of
                range.
        """
        hidden = self.decode(x, self.encode(source))
        if y is None:
            return self.logits(hidden), None
        return None, ops.linear_cross_entropy(hidden, self.wte.weight, y)

    def encode(self, source: Tensor) -> Memory:
        """source (B, S) -> what the decoder's layers look at."""
        self._check("source", source)
        h = self.wte(source) + self.source_positions.weight[: source.shape[1]]
        h = F.dropout(h, self.config.dropout, self.training)
        branch: Tensor | None = None
        for block in self.encoder:
            branch, h = block(branch, h)
        encoded, _ = self.encoder_norm(branch, residual=h)
        return [block.cross.memory(encoded) for block in self.decoder]  # type: ignore[operator,union-attr]

    def decode(self, x: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """x (B, T) -> what the head reads, (B, T, C). A cache has the tokens before x, and gets those of x."""
        self._check("x", x)
        past = 0 if cache is None else cache.length
        if past + x.shape[1] > self.config.block_size:
            raise ValueError(
                f"a target of {past + x.shape[1]} tokens is longer than block_size={self.config.block_size}"
            )
        h = self.wte(x) + self.target_positions.weight[past : past + x.shape[1]]
        h = F.dropout(h, self.config.dropout, self.training)
        branch: Tensor | None = None
        for block, keys_and_values in zip(self.decoder, memory, strict=True):
            branch, h = block(branch, h, keys_and_values, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        hidden, _ = self.norm(branch, residual=h)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        return linear(hidden, self.wte.weight)

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """How many numbers are learned; `non_embedding`: without the positions."""
        tables = sum(p.weight.numel() for p in (self.source_positions, self.target_positions)) if non_embedding else 0
        return sum(p.numel() for p in self.parameters()) - tables

    def flops_per_token(self, length: int | None = None) -> float:
        """6 for each parameter that is multiplied by; a target's token, its source counted as equally long."""
        return 6.0 * self.num_parameters(non_embedding=True)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.wte.weight.device

    def save_pretrained(self, path: str | os.PathLike[str], *, format: str = "fastlm") -> None:
        """Write config.json and model.safetensors to a folder, in one step."""
        from fastlm.models.folder import save_folder

        if format != "fastlm":
            raise ValueError(f"an EncoderDecoder can be saved in the format 'fastlm' only, got {format!r}")
        save_folder(self, path, MODEL_TYPE, self.config.to_dict())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> EncoderDecoder:
        """Load a folder that `save_pretrained` wrote; in evaluation mode. Raises as `fastlm.models.folder`."""
        from fastlm.models.folder import load_weights, read_folder

        model = cls(GPTConfig.from_dict(read_folder(path, MODEL_TYPE, "EncoderDecoder"))).to(device)
        load_weights(model, path)
        return model.eval()

    def _check(self, name: str, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"{name} must have shape (B, T) with at least one token, got {tuple(ids.shape)}")
        if ids.shape[1] > self.config.block_size:
            raise ValueError(f"{name} has {ids.shape[1]} tokens, block_size is {self.config.block_size}")
        check_ids(ids, self.config.vocab_size, name)


def _check_config(config: GPTConfig) -> None:
    wanted: dict[str, Any] = {
        "position": "learned",
        "sliding_window": None,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "qk_norm": False,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"an EncoderDecoder has {name}={value!r}, got {getattr(config, name)!r}")
    if (
        config.kv_heads != config.n_head
        or config.head_size * config.n_head != config.n_embd
        or not config.tie_embeddings
    ):
        raise ValueError("an EncoderDecoder has as many key heads as heads, n_embd / n_head wide, and one token table")
