"""AdamW as a torch.optim.Optimizer over the op `fastlm.ops.adamw_`.

Loshchilov, Hutter: Decoupled Weight Decay Regularization (arXiv:1711.05101).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import checks
from fastlm.ops.adamw import adamw_
from fastlm.ops.adamw.native import common_step
from fastlm.ops.library import untraced
from fastlm.optim.tracing import base_method

# Of a parameter's state what has a number for each of its elements; kept wide and contiguous.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
_Batch = list[tuple[Tensor, dict[str, Any]]]


class AdamW(torch.optim.Optimizer):
    """AdamW, one pass over memory a step.

        optimizer = fastlm.optim.AdamW(model.parameters(), lr=3e-4)
        norm, scale = fastlm.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=scale)

    The state dict has torch.optim.AdamW's keys, and each loads the other's. The moments are float32 whatever the
    parameter's dtype (float64 for float64 parameters), where torch keeps them in the parameter's.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts; a group may override everything below.
        lr: learning rate, a number or a tensor of one element, which is read at every step.
        betas: the decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled: the parameter shrinks by lr * weight_decay of itself every step.
        amsgrad: divide by the largest second moment so far (arXiv:1904.09237).
        maximize: go up the gradient.
        master_weights: keep a float32 copy of every bfloat16 or float16 parameter in the state ("master"), update that
            and round it into the parameter. Without it steps below half a unit in the last place are lost. Whoever
            writes to such a parameter other than through the optimizer must delete the copy from the state.

    Raises:
        ValueError: a hyperparameter is out of its range, or a parameter is complex or integer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        master_weights: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its missing options are the optimizer's. Raises ValueError where one is out of its range."""
        base_method(self, "add_param_group")(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or with `set_to_none=False` fill them with zeros."""
        base_method(self, "zero_grad")(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state, with the keys of torch.optim.AdamW's."""
        return base_method(self, "state_dict")()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in (("amsgrad", False), ("maximize", False), ("master_weights", False)):
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW. The tensors are copied.

        Groups keep this optimizer's `master_weights` where the state dict does not say; masters that it lacks start
        from the parameters.

        Raises:
            ValueError: the groups, or the shapes of the moments, do not fit this optimizer's parameters.
        """
        masters = [group["master_weights"] for group in self.param_groups]
        given: list[dict[str, Any]] = []  # what the hooks before it make of the state dict
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, changed: given.append(changed)),
            self.register_load_state_dict_post_hook(lambda _: self._take(given[-1], masters), prepend=True),
        ]
        try:
            base_method(self, "load_state_dict")(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, state_dict: dict[str, Any], masters: list[bool]) -> None:
        """torch has cast the moments to the parameter's dtype, and kept the caller's memory: do it over."""
        for group, saved, master_weights in zip(self.param_groups, state_dict["param_groups"], masters, strict=True):
            group["master_weights"] = saved.get("master_weights", master_weights)
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    self.state[p] = _loaded(p, state_dict["state"][key])

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float | Tensor = 1.0) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew; its result is returned.
            grad_scale: every gradient is multiplied by it on the way, without being changed: a number or a tensor of
                one element, such as the scale of `clip_grad_norm`.

        Raises:
            ValueError: a gradient is sparse (no parameter has been changed then), or does not fit its parameter.
            UnsupportedError: the backend that was asked for cannot run the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = [call for group in self.param_groups for call in self._calls(group)]
        for group, step, batch in calls:
            _step(group, step, batch, _on_device_of(batch[0][0], grad_scale))
        return loss

    def _calls(self, group: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int, _Batch]]:
        """The group's parameters that have gradients, by device and by the steps they have seen: mostly one batch."""
        found: _Batch = []
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                name = group["param_names"][i] if "param_names" in group else f"parameter {i} of its group"
                raise ValueError(
                    f"AdamW: the gradient of {name}, shape {tuple(p.shape)}, is sparse ({p.grad.layout}); only dense"
                    " gradients are supported (torch.optim.SparseAdam takes sparse ones)"
                )
            found.append((p, self._state_of(p, group)))
        steps = common_step([state["step"] for _, state in found])
        batches: dict[tuple[torch.device, int], _Batch] = defaultdict(list)
        for p, state in found:
            batches[p.device, int(state["step"].item()) if steps is None else steps].append((p, state))
        for (_, step), batch in batches.items():
            yield group, step, batch

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, with what its group's options need and it does not have yet."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # reading it waits for no device
            state["exp_avg"] = _zeros(p)
            state["exp_avg_sq"] = _zeros(p)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = _zeros(p)
        if _has_master(p, group) and "master" not in state:
            state["master"] = p.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return state


def _step(group: dict[str, Any], step: int, batch: _Batch, grad_scale: float | Tensor) -> None:
    states = [state for _, state in batch]
    beta1, beta2 = group["betas"]
    params: list[Any] = [p for p, _ in batch]
    grads: list[Any] = [p.grad for p in params]
    if any(g.is_neg() for g in grads):  # a kernel would not see that their signs are yet to be turned
        grads = [g.resolve_neg() for g in grads]
    local = _as_they_are if all(type(p) in checks.PLAIN for p in params) else _local
    adamw_(
        local(params),
        local(grads),
        local([s["exp_avg"] for s in states]),
        local([s["exp_avg_sq"] for s in states]),
        local([s["max_exp_avg_sq"] for s in states]) if group["amsgrad"] else None,
        local([s["master"] if _has_master(p, group) else None for p, s in batch]) if group["master_weights"] else None,
        step=step + 1,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        grad_scale=grad_scale,
        maximize=group["maximize"],
    )
    steps = [s["step"] for s in states]
    if common_step(steps, add_one=True) is None:
        torch._foreach_add_(steps, 1)


def _on_device_of(p: Tensor, grad_scale: float | Tensor) -> float | Tensor:
    """A tensor stays on the GPU, where reading it would wait; elsewhere it is a number."""
    if hasattr(grad_scale, "full_tensor"):
        grad_scale = grad_scale.full_tensor()
    if isinstance(grad_scale, Tensor) and p.is_cuda:
        return grad_scale.to(p.device)
    return float(grad_scale)


def _as_they_are(tensors: list[Any]) -> list[Any]:
    return tensors


def _local(tensors: list[Any]) -> list[Any]:
    """This process's part of tensors that are sharded: the update of an element needs no other one."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def _zeros(p: Tensor) -> Tensor:
    zeros = torch.zeros if type(p) in checks.PLAIN else p.new_zeros  # of a sharded parameter: sharded in the same way
    return zeros(p.shape, dtype=checks.statistics_dtype(p), device=p.device)


def _has_master(p: Tensor, group: dict[str, Any]) -> bool:
    return group["master_weights"] and p.dtype in (torch.bfloat16, torch.float16)


def _loaded(p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as this class keeps it: its own memory, wide contiguous moments, the step on the CPU."""
    state = dict(saved)
    if "step" in saved:
        state["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu")
    for name in MOMENTS:
        if name not in saved:
            continue
        if saved[name].shape != p.shape:
            raise ValueError(
                f"AdamW: the state dict's {name} has shape {tuple(saved[name].shape)}, its parameter {tuple(p.shape)}"
            )
        state[name] = saved[name].to(
            p.device, checks.statistics_dtype(p), copy=True, memory_format=torch.contiguous_format
        )
    return state


def _check_group(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: a tensor lr must have one element, got shape {tuple(lr.shape)}")
    if not float(lr) >= 0:
        raise ValueError(f"AdamW: lr must not be negative, got {lr}")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {betas}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"AdamW: {name} must not be negative, got {group[name]}")
    for p in group["params"]:
        if p.dtype not in checks.FLOATS:
            raise ValueError(
                "AdamW: parameters must be float32, bfloat16, float16 or float64,"
                f" got {p.dtype}, shape {tuple(p.shape)}"
            )
