"""python -m benchmarks.gpu.shapes: the kernels of GPT-2's training step, and of attention at 8k, beside the libraries'.

Where `python -m benchmarks.gpu` takes minutes, this takes ten seconds: for work on a kernel. Each line is the median of
twelve calls between two events of the stream, the L2 filled with other data before each. What a call costs in Python is
in it where the GPU has to wait for that: under about 300 µs for a forward and backward pass by autograd.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm import ops
from fastlm.generation.fused import FusedStep
from fastlm.ops import gemm
from fastlm.ops.mlp.native import CODE

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
ATTENTION = ((16, 1024, 12, 64), (2, 8192, 16, 128), (4, 4096, 16, 64))
TOKENS, WIDTH, HIDDEN, VOCABULARY, BLOCK = 16384, 768, 3072, 50304, 2688


@functools.cache
def _other_data() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def milliseconds(call: Callable[[], Any], times: int = 12) -> float:
    for _ in range(2):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for before, after in events:
        _other_data().zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def line(name: str, call: Callable[[], Any], flops: float = 0.0, moved: float = 0.0) -> None:
    """Prints the time, and the rate of the operations or of the bytes."""
    ms = milliseconds(call)
    rate = f"{flops / ms / 1e9:8.1f} TFLOP/s" if flops else f"{moved / ms / 1e6:8.0f} GB/s"
    print(f"{name:58s} {ms * 1e3:10.1f} µs {rate}", flush=True)


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda").mul_(scale).to(torch.bfloat16)


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor | None) -> Any:
    return torch.autograd.grad(function(*inputs), inputs, upstream)


def attention() -> None:
    for b, t, h, d in ATTENTION:
        inputs = tuple(randn(b, t, h, d).requires_grad_() for _ in range(3))
        upstream, flops = randn(b, t, h, d), 2.0 * b * h * t * t * d  # of the visible half

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, causal=True)

        def theirs(q: Tensor, k: Tensor, v: Tensor, which: str) -> Tensor:
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            with sdpa_kernel(SDPA[which]):
                return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

        peers: dict[str, Callable[..., Tensor]] = {"fastlm": ours}
        peers |= {f"sdpa {name}": functools.partial(theirs, which=name) for name in SDPA}
        for name, function in peers.items():
            title = f"attention {b}x{t}x{h}x{d} causal, {name}"
            with torch.no_grad():
                line(f"{title}, forward", functools.partial(function, *inputs), flops)
            line(f"{title}, forward + backward", functools.partial(gradients, function, inputs, upstream), 3.5 * flops)
            again = functools.partial(torch.autograd.grad, function(*inputs), inputs, upstream, retain_graph=True)
            line(f"{title}, backward", again, 2.5 * flops)


def products() -> None:
    x, dy, fc, proj = randn(TOKENS, WIDTH), randn(TOKENS, WIDTH), randn(HIDDEN, WIDTH, scale=0.03), randn(WIDTH, HIDDEN)
    bias, dbias = randn(HIDDEN), randn(HIDDEN)
    hidden, pre, dpre = (randn(TOKENS, HIDDEN) for _ in range(3))
    flops, gelu = 2.0 * TOKENS * WIDTH * HIDDEN, CODE["gelu_tanh"]
    size = f"{TOKENS}x{WIDTH}->{HIDDEN}"
    line(f"{size}, the library's product alone", lambda: x @ fc.T, flops)
    line(f"{size}, bias and GELU", lambda: gemm.activate(x, fc, bias, gelu, hidden, pre), flops)
    backward = (dy, proj.T, pre, gelu, dpre, hidden, dbias)
    line(f"{size}, GELU's backward and dbias", lambda: gemm.activate_backward(*backward), flops)
    logits, rows, table = randn(BLOCK, VOCABULARY), randn(BLOCK, WIDTH), torch.zeros(VOCABULARY, WIDTH, device="cuda")
    flops = 2.0 * BLOCK * WIDTH * VOCABULARY
    size = f"{VOCABULARY}x{WIDTH}, k={BLOCK}"
    line(f"{size}, the library's product alone", lambda: logits.T @ rows, flops)
    line(f"{size}, added in float32", lambda: gemm.product(logits.T, rows.T, table, accumulate=True), flops)


def head() -> None:
    x, weight = randn(TOKENS, WIDTH).requires_grad_(), randn(VOCABULARY, WIDTH, scale=0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    flops = 6.0 * TOKENS * WIDTH * VOCABULARY
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fastlm": lambda x, w: ops.linear_cross_entropy(x, w, targets),
        "eager": lambda x, w: F.cross_entropy((x @ w.T).float(), targets),
    }
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        peers["Liger"] = lambda x, w: Liger.apply(x, w, targets)[0]
    except ImportError:
        print("Liger is not installed")
    for name, function in peers.items():
        line(
            f"head and loss, forward + backward, {name}",
            functools.partial(gradients, function, (x, weight), None),
            flops,
        )


def float32() -> None:
    """The products are the library's; with TF32 as a user allows it, and without."""
    tokens = TOKENS // 2

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device="cuda").mul_(scale).requires_grad_()

    x, fc, fc_bias = leaf(tokens, WIDTH), leaf(HIDDEN, WIDTH, scale=0.03), leaf(HIDDEN)
    proj, proj_bias, table = leaf(WIDTH, HIDDEN, scale=0.03), leaf(WIDTH), leaf(VOCABULARY, WIDTH, scale=0.02)
    dy, targets = torch.randn(tokens, WIDTH, device="cuda"), torch.randint(VOCABULARY, (tokens,), device="cuda")
    blocks: dict[str, Callable[..., Tensor]] = {
        "fastlm": ops.mlp,
        "eager": lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), v, c),
    }
    heads: dict[str, Callable[..., Tensor]] = {
        "fastlm": lambda x, w: ops.linear_cross_entropy(x, w, targets),
        "eager": lambda x, w: F.cross_entropy(x @ w.T, targets),
    }
    mlp = functools.partial(gradients, inputs=(x, fc, fc_bias, proj, proj_bias), upstream=dy)
    loss = functools.partial(gradients, inputs=(x, table), upstream=None)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for name in blocks:
            title = f"{precision}, forward + backward, {name}"
            line(f"MLP in float32, {title}", functools.partial(mlp, blocks[name]), 12.0 * tokens * WIDTH * HIDDEN)
            line(f"head in float32, {title}", functools.partial(loss, heads[name]), 6.0 * tokens * WIDTH * VOCABULARY)
    torch.set_float32_matmul_precision("highest")


def generation() -> None:
    """Greedy, from a prompt of 64 tokens: tokens a second, and the time of a step, by the difference of two lengths. By
    the few kernels of one row, then layer by layer."""
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.preset("gpt2", vocab_size=VOCABULARY)).to("cuda", torch.bfloat16).eval()
    prompt = torch.randint(VOCABULARY, (1, 64), device="cuda")
    layers = mock.patch.object(FusedStep, "suits", return_value=False)
    for name, kernels in (("few kernels", nullcontext()), ("layer by layer", layers)):
        seconds = {}
        with kernels:
            for new in (64, 512):
                seconds[new] = milliseconds(lambda new=new: model.generate(prompt, new, temperature=0.0), 3) / 1e3
                print(f"GPT-2 124M, {name}, {new} new tokens: {new / seconds[new]:,.0f} tokens/s", flush=True)
        print(f"{name}, a step: {(seconds[512] - seconds[64]) / 448 * 1e6:,.0f} µs")


def optimizer() -> None:
    parameters = [torch.randn(1000, 1000, device="cuda") for _ in range(124)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    peers = {
        "fastlm": fastlm.optim.AdamW(parameters, lr=1e-4),
        "torch fused": torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "torch": torch.optim.AdamW(parameters, lr=1e-4),
    }
    for name, made in peers.items():
        line(f"AdamW, 124 M float32 parameters, {name}", made.step, moved=28.0 * 124e6)


PARTS = {
    "attention": attention,
    "products": products,
    "head": head,
    "float32": float32,
    "generation": generation,
    "optimizer": optimizer,
}

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU")
    torch.manual_seed(0)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
