"""`fastlm tune`: measure the configurations of the Triton kernels on this machine's GPU, and keep the best."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def tune(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
) -> None:
    """Measure the candidate configurations of the Triton kernels on the current GPU, and store the fastest of each
    problem in the user's cache, from which every later run takes them. Without it, shipped tables are used."""
    import torch

    import fastlm
    from fastlm.ops.triton_support import INTERPRETED, ahead, tuned, tuning, unavailable

    reason = "TRITON_INTERPRET is set" if INTERPRETED else unavailable()
    if reason is not None:
        raise fastlm.UnsupportedError(f"fastlm tune measures on a GPU: {reason}")
    modules = ahead.modules()
    for name in op or []:
        if name not in modules:
            raise ValueError(f"there is no Triton kernel of {name!r}; wanted one of {', '.join(modules)}")
    gpu = torch.cuda.get_device_name()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, module in modules.items():
        if op and name not in op:
            continue
        for example, choices in tuning.measure(module.examples(torch.device("cuda", torch.cuda.current_device()))):
            for choice in choices:
                best = choice.best()
                found.setdefault(choice.kernel.label, {})[repr(choice.problem)] = best.as_dict()
                gain = choice.times[0] / min(choice.times.values())
                typer.echo(f"{name} {example.name}: {choice.kernel.label} {best} ({gain:.2f}x the shipped choice)")
            torch.cuda.empty_cache()
    typer.echo(f"{gpu}: stored in {tuned.store(gpu, found)}")
