"""One token of one sequence through a GPT on a GPU, by few kernels (csrc/gpt/row_linear.cu).

Layer by layer a block of GPT-2 is a dozen kernels, each of which takes longer to begin than to read its weights. Here
the residual addition, the norm and the activation belong to the linear layer next to them: four kernels and
attention's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm.generation.decoder import KNOWN_MODULES
from fastlm.models.gpt import GPT
from fastlm.nn import RMSNorm
from fastlm.nn.attention import Cache
from fastlm.ops import native, registry
from fastlm.ops.mlp.native import CODE
from fastlm.ops.mlp.reference import GATED
from fastlm.ops.native import DTYPE_CODE, pointer


class FusedStep:
    """Stands in for `model.hidden_states` and `model.logits` of one token, while the weights stay where they are.

    Args:
        model: one that `suits`.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.programmatic = native.has_wgmma(model.wte.weight)  # compute capability 9.0: kernels may begin early

    @staticmethod
    def suits(model: GPT) -> bool:
        """Whether the kernels take the model: fastlm's own modules, one dtype, contiguous."""
        weight = model.wte.weight
        if weight.dtype not in DTYPE_CODE or not native.on_cuda(weight):
            return False
        if registry.choose("linear", weight.device.type, (weight, weight, None)) in ("reference", "triton"):
            return False
        for p in model.parameters():
            if type(p) is not nn.Parameter or p.device != weight.device or p.dtype != weight.dtype:
                return False
            if not p.is_contiguous() or p.data_ptr() % 16:
                return False
        if not all(type(module) in KNOWN_MODULES for module in model.blocks.modules()):
            return False
        depths = {m.in_features for m in model.blocks.modules() if isinstance(m, nn.Linear)}
        return all(native.C.row_linear_takes(depth, DTYPE_CODE[weight.dtype]) for depth in depths)

    def __call__(self, last: Tensor, cache: Cache) -> Tensor:
        """last (1, 1) token ids -> (1, 1, C); the new keys and values are in the cache, which has not advanced."""
        model = self.model
        positions = cache.positions(1, last.device)
        h = model.embed(last, positions)  # (1, 1, C)
        slopes = None if model.alibi is None else model.alibi.value
        rotation = None if model.rotary is None else model.rotary(positions)
        branch: Tensor | None = None
        blocks: list[Any] = list(model.blocks)
        for block in blocks:
            attention, mlp = block.attention, block.mlp
            qkv, h = self._linear(branch, h, block.norm_1, attention.qkv.weight, attention.qkv.bias)
            y = attention.attend(qkv, rotation=rotation, alibi_slopes=slopes, cache=cache, layer=block.layer)
            branch, _ = self._linear(None, y.flatten(2), None, attention.proj.weight, attention.proj.bias)
            hidden, h = self._linear(branch, h, block.norm_2, mlp.fc.weight, mlp.fc.bias, mlp.activation)
            branch, _ = self._linear(None, hidden, None, mlp.proj.weight, mlp.proj.bias)
        y, _ = model.norm(branch, residual=h)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (1, 1, C) -> (1, 1, V)."""
        return self.model.capped(self._linear(None, hidden, None, self.model.head_weight, None)[0])

    def _linear(
        self,
        branch: Tensor | None,
        h: Tensor,
        norm: Any,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The linear layer of norm(branch + h), and that sum; norm None: of h itself."""
        outputs = weight.shape[0] // (2 if activation in GATED else 1)
        y = h.new_empty(*h.shape[:-1], outputs)
        total = h if branch is None else torch.empty_like(h)
        norms = (None, None) if norm is None else (norm.weight, getattr(norm, "bias", None))
        x, residual = (h, None) if branch is None else (branch, h)
        tensors = x, residual, None if branch is None else total, *norms, weight, bias, y
        native.C.row_linear_cuda(
            tuple(map(pointer, tensors)),
            h.shape[-1],
            outputs,
            0.0 if norm is None else norm.eps,
            isinstance(norm, RMSNorm),
            -1 if activation is None else CODE[activation],
            DTYPE_CODE[h.dtype],
            self.programmatic,
            native.stream(h),
        )
        return y, total
