"""Who takes part: our backends, eager PyTorch, torch.compile, and other libraries where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import ops
from fastlm.bench.timing import BASELINE, reason_of
from fastlm.ops import registry
from fastlm.ops.attention.cases import slices
from fastlm.ops.case import Case


@dataclass
class Peer:
    """One way to do the work.

    Args:
        name: how it appears in the report.
        function: with the op's arguments.
        reason: why it cannot take part, or None.
        context: what is entered around the calls.
    """

    name: str
    function: Callable[..., Any]
    reason: str | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def peers_of(case: Case, arguments: dict[str, Any]) -> list[Peer]:
    """All peers of a case, those that cannot run it included, each with its reason."""
    found = [Peer(BASELINE, case.eager), *_ours(case, arguments)]
    for name, make in (*_TORCH.get(case.op, {}).items(), *_LIBRARIES.get(case.op, {}).items()):
        try:
            found.append(Peer(name, make(arguments)))
        except _Unsuitable as error:
            found.append(Peer(name, case.eager, str(error)))
        except Exception as error:
            found.append(Peer(name, case.eager, reason_of(error)))
    if "in-place" not in case.traits:
        found.append(Peer("torch.compile", _compiled(case.eager)))
    return found


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call: even to import the compiler takes seconds."""
    made: list[Callable[..., Any]] = []

    def call(**arguments: Any) -> Any:
        if not made:
            made.append(torch.compile(function))
        return made[0](**arguments)

    return call


def _ours(case: Case, arguments: dict[str, Any]) -> list[Peer]:
    op = getattr(ops, case.op)
    explanation = ops.explain(op, **arguments)
    peers = []
    for name, reason in explanation.reasons.items():
        if name == "reference" and explanation.chosen != "reference":
            reason = "plain PyTorch, made to be read; it is what the others are checked against"
        peer = Peer(f"fastlm {name}", op, reason)
        if name != explanation.chosen:  # that one is called as users call it: without a context around each call
            peer.context = functools.partial(fastlm.backend, name)
        peers.append(peer)
    return peers


_Maker = Callable[[dict[str, Any]], Callable[..., Any]]  # from a case's arguments to a function of them


class _Unsuitable(Exception):
    """The peer does not do what this case asks for. The message says what."""


def library(name: str) -> Any:
    """Another library's module. Raises ImportError where it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"{name.partition('.')[0]} is not installed")
    return importlib.import_module(name)


def _only(arguments: dict[str, Any], allowed: set[str]) -> None:
    """Every option that is set is one that the peer has."""
    for name in arguments.keys() - allowed:
        raise _Unsuitable(f"it has no {name}")


def _sdpa(arguments: dict[str, Any]) -> Callable[..., Any]:
    _only(arguments, {"q", "k", "v", "causal", "scale"})
    if arguments.get("causal") and arguments["q"].shape[1] not in (1, arguments["k"].shape[1]):
        raise _Unsuitable("its causal mask is aligned top-left")

    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Tensor:
        one_row = q.shape[1] == 1  # sees every column
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal and not one_row,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)

    return attention


def _torch_fused_adamw(arguments: dict[str, Any]) -> Callable[..., Any]:
    def step(params, grads, exp_avgs, exp_avg_sqs, *, step, lr, weight_decay):  # type: ignore[no-untyped-def]
        torch._fused_adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [torch.tensor(float(step), device=params[0].device) for _ in params],
            lr=lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    if arguments["params"][0].dtype != arguments["exp_avgs"][0].dtype:
        raise _Unsuitable("its moments must have the parameter's dtype")
    return step


def _flash_attention(arguments: dict[str, Any]) -> Callable[..., Any]:
    module = library("flash_attn")
    q = arguments["q"]
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        raise _Unsuitable(f"it is for bfloat16 and float16 on CUDA, got {q.dtype} on {q.device.type}")
    _only(arguments, {"q", "k", "v", "causal", "scale", "window", "softcap"})

    def attention(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0):  # type: ignore[no-untyped-def]
        sides = tuple(-1 if side is None else side for side in window or (-1, -1))
        return module.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, window_size=sides, softcap=softcap)

    return attention


def _on_slices(make: _Maker) -> _Maker:
    """A peer of attention as one of attention_qkvpacked."""

    def make_packed(arguments: dict[str, Any]) -> Callable[..., Any]:
        options = dict(arguments)
        q, k, v = slices(*(options.pop(name) for name in ("qkv", "n_head", "n_kv_head")))
        attention = make({"q": q, "k": k, "v": v, **options})

        def attention_qkvpacked(qkv: Tensor, n_head: int, n_kv_head: int, **options: Any) -> Tensor:
            return attention(*slices(qkv, n_head, n_kv_head), **options)

        return attention_qkvpacked

    return make_packed


def _liger(arguments: dict[str, Any]) -> Any:
    module = library("liger_kernel.transformers.functional")
    if not next(iter(arguments.values())).is_cuda:
        raise _Unsuitable("its kernels need a GPU")
    return module


def _liger_layer_norm(arguments: dict[str, Any]) -> Callable[..., Any]:
    liger = _liger(arguments)

    def layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None):  # type: ignore[no-untyped-def]
        h = x if residual is None else x + residual
        bias = torch.zeros_like(weight) if bias is None else bias
        y = liger.liger_layer_norm(h, weight, bias, eps)
        return y if residual is None else (y, h)

    return layer_norm


def _liger_rms_norm(arguments: dict[str, Any]) -> Callable[..., Any]:
    liger = _liger(arguments)

    def rms_norm(x, weight, *, eps=1e-6, residual=None):  # type: ignore[no-untyped-def]
        if residual is None:
            return liger.liger_rms_norm(x, weight, eps, in_place=False)
        return liger.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)

    return rms_norm


def _liger_mlp(arguments: dict[str, Any]) -> Callable[..., Any]:
    liger = _liger(arguments)
    kernels = {"swiglu": liger.liger_swiglu, "geglu": liger.liger_geglu}
    activation = arguments.get("activation", "gelu_tanh")
    if activation not in kernels:
        raise _Unsuitable(f"it has no {activation}")

    def mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, *, activation):  # type: ignore[no-untyped-def]
        gate, up = F.linear(x, fc_weight, fc_bias).chunk(2, -1)
        return F.linear(kernels[activation](gate, up), proj_weight, proj_bias)

    return mlp


def _liger_loss(arguments: dict[str, Any]) -> Callable[..., Any]:
    liger = _liger(arguments)
    _only(arguments, {"x", "weight", "targets"})

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return liger.liger_fused_linear_cross_entropy(x, weight, targets)

    return loss


_Makers = dict[str, dict[str, _Maker]]
_TORCH: _Makers = {
    "attention": {"sdpa": _sdpa},
    "attention_qkvpacked": {"sdpa": _on_slices(_sdpa)},
    "adamw_": {"torch fused": _torch_fused_adamw},
}
_LIBRARIES: _Makers = {
    "attention": {"flash-attn": _flash_attention},
    "attention_qkvpacked": {"flash-attn": _on_slices(_flash_attention)},
    "layer_norm": {"liger": _liger_layer_norm},
    "rms_norm": {"liger": _liger_rms_norm},
    "mlp": {"liger": _liger_mlp},
    "linear_cross_entropy": {"liger": _liger_loss},
}


def backends_here() -> dict[str, str | None]:
    """Our backends: None where it is available on this machine, else the reason why not."""
    return {name: registry.unavailable(name) for name in registry.NAMES}
