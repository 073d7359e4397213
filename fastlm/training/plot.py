"""The loss curves of a run as a picture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastlm.training.journal import read_journal


def plot_losses(
    journal: str | Path,
    picture: str | Path,
    *,
    title: str = "",
    bytes_per_token: float | None = None,
    gzip_bits: float | None = None,
) -> None:
    """Draw training and validation loss over the steps from a log.jsonl into a PNG.

    Args:
        bytes_per_token: draws a second axis in bits per byte.
        gzip_bits: draws gzip's bits per byte on the held-out text as a line (needs bytes_per_token).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state of pyplot
    from matplotlib.figure import Figure

    records = read_journal(journal)
    steps = [r for r in records if r["kind"] == "step"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x = [r["step"] for r in steps]
    axes.plot(x, [r["loss"] for r in steps], color="tab:blue", alpha=0.25, linewidth=0.8, label="training")
    axes.plot(x, _smoothed([r["loss"] for r in steps]), color="tab:blue", linewidth=1.6, label="training, smoothed")
    axes.plot(
        [r["step"] for r in evaluations],
        [r["val_loss"] for r in evaluations],
        color="tab:orange",
        marker="o",
        markersize=4,
        label="validation",
    )
    if bytes_per_token:
        scale = math.log(2) * bytes_per_token  # nats a token = bits a byte * scale
        second = axes.secondary_yaxis(
            "right", functions=(lambda nats: np.divide(nats, scale), lambda bits: np.multiply(bits, scale))
        )
        second.set_ylabel("bits per byte")
        if gzip_bits is not None:
            label = f"gzip -9: {gzip_bits:.2f} bits per byte"
            axes.axhline(gzip_bits * scale, color="tab:gray", linestyle="--", linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)  # the name of a run may have dollars in it
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)


@contextlib.contextmanager
def picture_or_note(picture: object, note: Callable[[str], None]) -> Iterator[None]:
    """A picture that cannot be drawn within it is noted: it ends no run, and hides no other error."""
    try:
        yield
    except Exception as error:
        note(f"{picture} could not be drawn: {type(error).__name__}: {error}")


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over a fiftieth of the curve, without the pull of its start (as in Adam)."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out
