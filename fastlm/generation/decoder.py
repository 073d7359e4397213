"""Decoding on the CPU: one token for each of a few rows through all blocks, by one call of C++.

Called layer by layer from Python, a generated token of a small model spends most of its time between the kernels. The
arithmetic is that of the CPU kernels (csrc/gpt/decode.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm.generation.cache import KVCache, RaggedCache
from fastlm.models.gpt import GPT, Block
from fastlm.nn import MLP, Attention, LayerNorm, RMSNorm
from fastlm.nn.linear import Linear
from fastlm.ops import native, registry
from fastlm.ops.library import untraced
from fastlm.ops.mlp.native import CODE
from fastlm.ops.native import DTYPE_CODE, pointer
from fastlm.ops.products import SKINNY_ROWS

KNOWN_MODULES = (nn.ModuleList, Block, Attention, MLP, LayerNorm, RMSNorm, Linear, nn.Linear)


class Decoder:
    """Stands in for `model.hidden_states` while the model's weights and modules stay as they are: for one generation.

    Args:
        model: one that `suits`.
    """

    def __init__(self, model: GPT) -> None:
        self.model, config = model, model.config
        self.weights: list[int] = []
        blocks: list[Any] = list(model.blocks)
        for block in blocks:
            attention, mlp = block.attention, block.mlp
            self.weights += [*_addresses(block.norm_1), *_addresses(attention.qkv)]
            self.weights += [_addresses(norm)[0] if norm else 0 for norm in (attention.q_norm, attention.k_norm)]
            for layer in (attention.proj, block.norm_2, mlp.fc, mlp.proj):
                self.weights += _addresses(layer)
        self.weights += _addresses(model.norm)
        attention = blocks[0].attention
        window = -1 if attention.window is None else attention.window[0]
        self.sizes = (config.n_embd, config.n_head, config.kv_heads, config.head_size, config.mlp_size, window)
        scale = config.head_size**-0.5 if attention.scale is None else attention.scale
        self.scalars = (config.norm == "rms_norm", config.norm_eps, scale, config.attention_softcap)
        self.codes = (CODE[config.activation], DTYPE_CODE[model.wte.weight.dtype])
        self.slopes = None if model.alibi is None else model.alibi.value.contiguous()

    @staticmethod
    def suits(model: GPT) -> bool:
        """Whether the model is what the C++ code knows: on the CPU, of one dtype, of fastlm's own modules, unhooked."""
        if type(model) is not GPT:
            return False
        weight = model.wte.weight
        if weight.device.type != "cpu" or weight.dtype not in DTYPE_CODE or native.cpu_unavailable() is not None:
            return False
        if torch.is_autocast_enabled("cpu") or registry.choose("linear", "cpu", (weight, weight, None)) != "cpu":
            return False
        if any(p.dtype != weight.dtype or not p.is_cpu or not p.is_contiguous() for p in model.parameters()):
            return False
        return all(
            type(module) in KNOWN_MODULES and not (module._forward_hooks or module._forward_pre_hooks)
            for module in model.blocks.modules()
        )

    @untraced
    def __call__(self, last: Tensor, cache: KVCache | RaggedCache) -> Tensor:
        """What `model.hidden_states(last, cache=cache)` gives: last (B, 1) token ids -> (B, 1, C)."""
        if len(last) > SKINNY_ROWS:
            return self.model.hidden_states(last, cache=cache)
        groups = cache.caches if isinstance(cache, RaggedCache) else [cache]
        positions = cache.positions(1, last.device)
        h = self.model.embed(last, positions)  # (B, 1, C), a new tensor: it becomes the residual stream
        out = torch.empty_like(h)
        cos, sin = (None, None) if self.model.rotary is None else self.model.rotary(positions)
        native.C.decode(
            self.weights,
            [group.addresses() for group in groups],
            self.sizes,
            (pointer(self.slopes), pointer(cos), pointer(sin), h.data_ptr(), out.data_ptr()),
            positions.dim() > 1,
            *self.scalars,
            *self.codes,
        )
        cache.advance(1)
        return out


def _addresses(layer: Any) -> tuple[int, int]:
    return layer.weight.data_ptr(), pointer(getattr(layer, "bias", None))
