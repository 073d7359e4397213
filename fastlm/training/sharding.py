"""FSDP2: every process keeps its part of the weights, gradients and moments (Zhao et al., arXiv:2304.11277).

The weights of a block are gathered when it runs and let go of afterwards. The optimizer works on this process's parts
as on any tensors; checkpoints are gathered, and so are the same files that one process writes and reads.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlm.optim.adamw import MOMENTS
from fastlm.optim.clip import GradNorm, clip_grad_norm

ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # FSDP2 calls it, and not every torch has it (2.6 does not)


class Shards(nn.Module):
    """Shards a model in place, and holds this process's part of every parameter as a plain parameter of its own.

    Args:
        model: whole, with the same weights on every process. What it lists in `blocks` is gathered block by block.

    Raises:
        ValueError: the model is on a CPU, and this torch shards on GPUs alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # A block returns views; nothing here writes to them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        device = next(model.parameters()).device
        if device.type == "cpu" and not ON_CPU:
            raise ValueError(
                f"training.parallel = fsdp: torch {torch.__version__} cannot shard a model on a CPU (2.11 can);"
                " take ddp, or a newer torch"
            )
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")  # an entrance beside forward: it gathers the weights, too
        self._model = [model]  # in a list, so that it is no submodule
        self._sharded: list[Any] = list(model.parameters())  # DTensors
        self.parts = nn.ParameterList(
            nn.Parameter(p.detach().to_local(), requires_grad=p.requires_grad) for p in self._sharded
        )

    def take_gradients(self) -> None:
        """Give each part the gradient of its parameter, already averaged over the processes."""
        for part, p in zip(self.parts, self._sharded, strict=True):
            part.grad = None if p.grad is None else p.grad.to_local()
            p.grad = None

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Within it the model may be called outside of training; its weights are let go of at the end."""
        try:
            yield
        finally:
            self._model[0].reshard()  # type: ignore[operator]

    def clip_grad_norm(self, max_norm: float) -> GradNorm:
        """`fastlm.optim.clip_grad_norm` over the gradients of all processes."""
        square = clip_grad_norm(self.parts, math.inf).norm.to(self.parts[0].device).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        return GradNorm(norm, torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the whole model on the CPU; all processes must ask, and all get it."""
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()
            for name, value in self._model[0].state_dict().items()
        }

    def gathered(self, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict over the parts as the one over whole parameters; all processes must ask."""
        from torch.distributed.tensor import DTensor

        def whole(index: int, part: Tensor) -> Tensor:
            p = self._sharded_of(optimizer_state, index)
            full = DTensor.from_local(part, self._mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            return full.full_tensor().cpu()

        return self._moments_by(whole, optimizer_state)

    def scattered(self, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """The reverse of `gathered`: of whole moments, those of this process's parts."""
        from torch.distributed.tensor import distribute_tensor

        def part(index: int, full: Tensor) -> Tensor:
            p = self._sharded_of(optimizer_state, index)
            if full.shape != p.shape:
                raise ValueError(
                    f"the optimizer state has a moment of shape {tuple(full.shape)} for a parameter of {tuple(p.shape)}"
                )
            return distribute_tensor(full.to(p.device), self._mesh, p.placements).to_local()

        return self._moments_by(part, optimizer_state)

    def _moments_by(self, change: Any, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        state = {
            index: {name: change(index, v) if name in MOMENTS else v for name, v in entries.items()}
            for index, entries in sorted(optimizer_state["state"].items())
        }
        return {**optimizer_state, "state": state}

    def _sharded_of(self, optimizer_state: dict[str, Any], index: int) -> Any:
        """The parameter behind an index of the optimizer's state: groups first, then their order (see optimizer.py)."""
        if not hasattr(self, "_order"):
            trained = [p for p in self._sharded if p.requires_grad]
            self._order = [p for p in trained if p.dim() >= 2] + [p for p in trained if p.dim() < 2]
        return self._order[index]
