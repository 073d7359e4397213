"""How well classes are told apart: accuracy, macro-F1, the confusion matrix and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlm.evaluation.choice import RESAMPLES, bootstrap_interval


@dataclass(frozen=True)
class ClassScore:
    """Of predictions against the truth.

    Attributes:
        accuracy: the part that is right, with its 95 % bootstrap interval over the examples.
        macro_f1: the mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in the truth or in the
            predictions, with its interval.
        confusion: confusion[i][j] examples of class i were taken for class j.
        labels: the names of the classes.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    macro_f1_interval: tuple[float, float]
    confusion: list[list[int]]
    labels: tuple[str, ...]


def score_classes(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str], seed: int = 0) -> ClassScore:
    """Score predictions (indices into labels); ValueError where there are none, or not one for each example."""
    if len(truth) != len(predicted) or not len(truth):
        raise ValueError(f"wanted a prediction for each example, got {len(predicted)} for {len(truth)}")
    true, guess = np.asarray(truth), np.asarray(predicted)
    cells = true * len(labels) + guess
    generator = np.random.default_rng(seed)
    size = len(labels)
    resampled = [
        _macro_f1(_confusion(cells[generator.integers(0, len(cells), len(cells))], size)) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    confusion = _confusion(cells, size)
    return ClassScore(
        accuracy=float((true == guess).mean()),
        accuracy_interval=bootstrap_interval((true == guess).tolist(), seed),
        macro_f1=_macro_f1(confusion),
        macro_f1_interval=(float(low), float(high)),
        confusion=confusion.tolist(),
        labels=tuple(labels),
    )


def plot_confusion(score: ClassScore, picture: str | Path, title: str = "") -> None:
    """The confusion matrix as a PNG: rows are the truth, columns the predictions; the colour is the part of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state of pyplot
    from matplotlib.figure import Figure

    counts = np.asarray(score.confusion)
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.5 + 0.7 * len(score.labels)
    figure = Figure(figsize=(size + 0.8, size), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j, i, f"{count}", ha="center", va="center", color="white" if parts[i, j] > 0.5 else "black")
    # labels may have dollars in them
    axes.set_xticks(range(len(score.labels)), score.labels, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(score.labels)), score.labels, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title or f"accuracy {score.accuracy:.3f}, macro-F1 {score.macro_f1:.3f}", parse_math=False)
    figure.colorbar(image, ax=axes, label="part of the true class")
    figure.savefig(picture)


def _confusion(cells: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def _macro_f1(confusion: np.ndarray) -> float:
    right = np.diag(confusion)
    wrong = confusion.sum(0) + confusion.sum(1) - 2 * right  # false positives and false negatives
    occurs = right + wrong > 0  # a class may be absent from a resample
    return float(np.mean(2.0 * right[occurs] / (2.0 * right + wrong)[occurs]))
