"""Self-attention as a module: one packed projection in, one projection out."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn.linear import Linear
from fastlm.nn.norm import RMSNorm


class Cache(Protocol):
    """What attention and the model ask of a store of keys and values (`fastlm.generation.cache` has two)."""

    @property
    def length(self) -> int:
        """How many tokens the longest row has."""
        ...

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions of the next `tokens` tokens of each row: (T), or (B, T) where rows differ."""
        ...

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append k and v (B, T, H_kv, D) to the layer's, and let q (B, T, H, D) attend to all of them."""
        ...

    def advance(self, tokens: int) -> None:
        """All layers have stored this many tokens more."""
        ...


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, causal unless told otherwise.

    `qkv` is one projection; its rows are the queries of all heads, then the keys, then the values. Attention reads the
    three as views of its result, without a copy, and writes their gradients into one (in training rotary positions
    write new queries and keys, and autograd concatenates the gradients).
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        dropout: float = 0.0,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head or n_head
        self.head_dim = head_dim or n_embd // n_head
        self.causal = causal
        self.scale, self.window, self.softcap, self.dropout = scale, window, softcap, dropout
        self.qkv = Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_dim, bias=qkv_bias)
        self.proj = Linear(n_head * self.head_dim, n_embd, bias=proj_bias)
        # over each head, before rotary positions (Dehghani et al., arXiv:2302.05442, with RMS norm as Qwen3 has it)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x (B, T, C) -> (B, T, C); the options are those of `attend`."""
        return self.proj(self.attend(self.qkv(x), **options).flatten(2))

    def attend(
        self,
        qkv: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        alibi_slopes: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """What stands between the projections: qkv (B, T, (H + 2 H_kv) D) -> (B, T, H, D).

        Args:
            rotation: cosines and sines of the angles of the tokens (see `fastlm.ops.rotary`).
            alibi_slopes: (H), float32.
            cu_seqlens, max_seqlen: packed sequences, B = 1 (see `fastlm.ops.attention`).
            cache: keys and values of the tokens before; those of qkv are appended under `layer`.
        """
        options: dict[str, Any] = {
            "causal": self.causal,
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": alibi_slopes,
            "dropout_p": self.dropout if self.training else 0.0,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
        }
        if rotation is None and cache is None and self.q_norm is None:
            return ops.attention_qkvpacked(qkv, self.n_head, self.n_kv_head, **options)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 H_kv, D)
        # Its backward pass is one concatenation; that of three slices is three tensors of zeros, and their sum.
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:  # in the projection's own memory, where no backward pass will ask for it
            recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
            q, k = ops.rotary(q, k, *rotation, inplace=not recorded)
        if cache is None:
            return ops.attention(q, k, v, **options)
        return cache.attention(layer, q, k, v, **options)

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, n_kv_head={self.n_kv_head}, head_dim={self.head_dim}, dropout={self.dropout}"
