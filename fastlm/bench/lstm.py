"""The LSTM layer, forward and backward, against nn.LSTM in eager PyTorch: `python -m fastlm.bench.lstm`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlm.bench import report, timing
from fastlm.bench.timing import BASELINE, Comparison
from fastlm.models.lstm import LSTMLayer

SIZES = ((32, 64, 128), (32, 64, 256), (64, 35, 512), (32, 64, 512), (16, 128, 1024))  # batch, steps, width


def layers(width: int) -> tuple[LSTMLayer, nn.LSTM]:
    """The same layer twice."""
    torch.manual_seed(0)
    theirs = nn.LSTM(width, width, batch_first=True)
    ours = LSTMLayer(width, width)
    with torch.no_grad():
        weights = dict(theirs.named_parameters())
        ours.weight_ih.copy_(weights["weight_ih_l0"])
        ours.weight_hh.copy_(weights["weight_hh_l0"])
        ours.bias.copy_(weights["bias_ih_l0"] + weights["bias_hh_l0"])
    return ours, theirs


def compare(batch: int, steps: int, width: int, rounds: int) -> Comparison:
    """Forward and backward of one layer; `error` is the largest relative difference of a result from nn.LSTM's."""
    ours, theirs = layers(width)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, steps, width, generator=generator).requires_grad_()
    dy = torch.randn(batch, steps, width, generator=generator)
    zeros = torch.zeros(batch, width)

    def step_of(forward: Callable[[], Tensor], module: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy))

        return step

    calls = {
        "fastlm": step_of(lambda: ours(x, zeros, zeros)[0], ours),
        BASELINE: step_of(lambda: theirs(x)[0], theirs),
    }
    results = timing.interleave(calls, rounds)
    got, wanted = calls["fastlm"](), calls[BASELINE]()
    pairs = zip(got, wanted[: len(got)], strict=True)  # nn.LSTM has a second bias
    results["fastlm"].error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    name = f"lstm layer {batch}x{steps}x{width}"
    return Comparison("lstm", name, "forward+backward", "float32", list(results.values()))


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the results")
    options = parser.parse_args()
    console, where = Console(), report.environment()
    report.print_environment(console, where)
    comparisons = []
    for size in SIZES:
        comparisons.append(compare(*size, options.rounds))
        console.print(report.table(comparisons[-1]))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(options.out, where, {"rounds": options.rounds}, comparisons)
        console.print(f"Written: {options.out}", highlight=False)


if __name__ == "__main__":
    main()
