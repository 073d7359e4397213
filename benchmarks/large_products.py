"""Large products on the CPU: our kernel beside PyTorch's library.

    python -m benchmarks.large_products [--dtype bfloat16]

The three products of a linear layer, of `rows` tokens: y = x w^T + bias, dx = dy w, and dw += dy^T x, which is float32.
The two kernels take turns. On processors where the library is as fast (fastlm.ops.products.library_lags), fastlm does
not use its own.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from fastlm.bench.timing import interleave
from fastlm.ops import memory, products

# (rows, depth, columns)
SHAPES = (
    (1024, 768, 2304),
    (1024, 768, 3072),
    (1024, 3072, 768),
    (3072, 384, 1536),
    (3072, 384, 384),
    (1024, 384, 384),
    (512, 768, 50304),
    (4096, 512, 64),
    (256, 256, 256),
    (128, 256, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", help="as 1024x768x3072", type=_shape, default=SHAPES)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; used here: {products.library_lags()}; GFLOP/s of ours, of the library's")
    for rows, depth, cols in options.shapes:
        dtype = getattr(torch, options.dtype)
        sizes = ((rows, depth), (cols, depth), (cols,), (rows, cols))
        x, weight, bias, dy = (torch.randn(size).to(dtype) for size in sizes)
        calls = (("y", x, weight.t(), bias), ("dx", dy, weight, None), ("dw", dy.t(), x, None))
        results = [_compare(*call, accumulate=call[0] == "dw", rounds=options.rounds) for call in calls]
        print(f"{rows} x {depth} x {cols}:", *results, flush=True)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def _compare(name: str, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool, rounds: int) -> str:
    out = memory.empty((a.shape[0], b.shape[1]), torch.float32 if accumulate else a.dtype).zero_()

    def ours() -> None:
        products.packed(a, b, out, bias, accumulate)

    def library() -> None:
        if accumulate:
            out.addmm_(a, b) if out.dtype == a.dtype else out.add_(a @ b)
        else:
            torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)

    results = interleave({"ours": ours, "library": library}, rounds)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    rates = [flops / 1e9 / statistics.median(result.seconds) for result in results.values()]
    pairs = zip(results["ours"].seconds, results["library"].seconds, strict=True)
    return f"{name} {rates[0]:.0f}, {rates[1]:.0f} ({statistics.median(theirs / own for own, theirs in pairs):.2f}x) "


if __name__ == "__main__":
    main()
