"""`fastlm bench`: our kernels and models beside eager PyTorch and other libraries, measured here and now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    ops: Annotated[str, typer.Option(help="Names with commas between, all, or none.")] = "all",
    sizes: Annotated[
        str, typer.Option(help="Models to train and to generate with: nano, micro, char, gpt2, gpt2-long, …, or none.")
    ] = "micro",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (CPU default), bfloat16 (GPU default) or float16.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="At most so many rounds of each comparison.")] = 9,
    out: Annotated[Path, typer.Option(help="The folder for report.json and the pictures.")] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, no torch.compile: a minute or two.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every case of every op, and GPT-2 124M: half an hour.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in processes of their own.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Measure fastlm beside its peers, in turns, in one run, and check the numbers they compute.

    Speed-ups are the median over the rounds of the ratio to eager PyTorch written as a textbook would, with quartiles.
    The error of an op is the relative difference from plain PyTorch in float32, of a training step that of its losses,
    of generation the part of the tokens that differ.
    """
    import torch
    from rich.console import Console

    from fastlm.bench.run import COMPILER, Options, run

    if quick and full:
        raise ValueError("--quick and --full are opposites: give one of them")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = _names(sizes)
    if full and "gpt2" not in names:
        names = (*names, "gpt2")
    options = Options(
        ops=None if ops == "all" else _names(ops),
        sizes=names,
        dtype=dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16"),
        device=device,
        rounds=min(rounds, 3) if quick else rounds,
        seconds=1.0 if quick else 30.0 if full else 5.0,
        full=full,
        memory=memory,
        skip=(COMPILER,) if quick else (),
    )
    run(options, out, Console())


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())
