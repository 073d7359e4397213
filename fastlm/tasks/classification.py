"""Fine-tuning to classes: a linear head over a causal or a masked model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.data.examples import ExampleLoader, pack
from fastlm.data.special import special_ids
from fastlm.data.tables import read_table
from fastlm.evaluation.classes import ClassScore, plot_confusion, score_classes
from fastlm.models.classifier import Classifier, ClassifierConfig
from fastlm.models.encoder import Encoder
from fastlm.models.gpt import GPT
from fastlm.nn.modes import evaluating
from fastlm.tasks.epochs import set_steps
from fastlm.tasks.pretrained import check_adapters, open_pretrained, trained_model
from fastlm.training.config import RunConfig
from fastlm.training.distributed import Processes
from fastlm.training.run import Loaders, choose_checkpoint

PICTURE = "confusion.png"


@dataclass
class ClassificationSettings:
    """The [task] section of `--task classification`."""

    train: str = ""  # a .tsv, .csv or .jsonl file
    val: str = ""  # the same, to choose the checkpoint by
    test: str = ""  # the same, for the metrics at the end
    text_column: str = "text"
    label_column: str = "label"
    labels: str = ""  # "negative,positive": the set, in this order; default: those of the training file, sorted
    val_fraction: float = 0.1  # without `val`, this part of the training file
    test_fraction: float = 0.0  # without `test`, this part of the training file, taken first
    split_seed: int = 0
    epochs: float = 0.0  # passes over the training examples; 0: training.steps counts
    class_weights: str = "none"  # "balanced": a class counts the more, the rarer it is; or "1.0,3.5", by class
    pooling: str = "auto"  # mean, first, last; auto: mean for a masked model, last for a causal one
    head_dropout: float = 0.1
    dropout: float = -1.0  # of the model while it learns; -1: its own
    from_scratch: bool = False  # the model's shape with new weights: what the pretraining is worth


Example = tuple[str, str]  # text, label


class Task:
    """See `fastlm.tasks.registry`."""

    Settings = ClassificationSettings

    def __init__(self, model: Path, settings: ClassificationSettings, config: RunConfig):
        if not settings.train:
            raise ValueError("task.train is missing: a .tsv, .csv or .jsonl file")
        self._folder, self._settings, self._config = model, settings, config
        self.tokenizer: Tokenizer = open_pretrained(model)[1]
        train, val, test = split_examples(settings)
        self.labels = label_set(settings, train)
        check_classes(train, self.labels, settings.train)
        for name, part in ((settings.val or settings.train, val), (settings.test or settings.train, test)):
            check_labels(part, self.labels, name)
        self._train, self._val, self._test = train, val, test

    def make_model(self) -> Classifier:
        """The model with a new head."""
        settings = self._settings
        model = trained_model(self._folder, self._config.lora, settings.dropout, settings.from_scratch)
        return Classifier(model, self._head(model)).train()

    def open_model(self, path: Path) -> Classifier:
        """Of a checkpoint; ValueError where the settings or the classes are other ones."""
        model = Classifier.from_pretrained(path)
        check_adapters(model.backbone, self._config.lora, path)
        if model.config != self._head(model.backbone):
            raise ValueError(
                f"the checkpoint {path} has another head than the settings and the data ask for: {model.config}, "
                f"not {self._head(model.backbone)}"
            )
        return model

    def _head(self, model: GPT | Encoder) -> ClassifierConfig:
        settings, pooling = self._settings, self._settings.pooling
        if pooling == "auto":
            pooling = "last" if isinstance(model, GPT) else "mean"
        weights = class_weights(settings.class_weights, [label for _, label in self._train], self.labels)
        return ClassifierConfig(self.labels, pooling, settings.head_dropout, weights)

    def loaders(self, model: Classifier, group: Processes) -> Loaders:
        """The examples, packed; sets training.steps from the epochs."""
        t = self._config.training

        def loader(examples: Sequence[Example], **part: int) -> ExampleLoader:
            ids = encode([text for text, _ in examples], self.tokenizer, model)
            numbers = [self.labels.index(label) for _, label in examples]
            return ExampleLoader(ids, numbers, t.batch_size, class_weights=model.config.class_weights, **part)

        train = loader(self._train, seed=t.seed, rank=group.rank, world_size=group.world_size)
        set_steps(self._config, self._settings.epochs, train)
        return train, loader(self._val) if self._val else None

    def finish(self, run: Path) -> dict[str, Any]:
        """The best checkpoint on the test examples (else on the validation's)."""
        examples, split = (self._test, "test") if self._test else (self._val, "val")
        if not examples:
            return {}
        model = Classifier.from_pretrained(choose_checkpoint(run).model_path)
        score = evaluate(model, self.tokenizer, examples)
        return {"split": split, "examples": len(examples), **asdict(score)}

    def draw(self, run: Path, metrics: dict[str, Any]) -> None:
        """The picture of the confusions."""
        if metrics:
            score = {name: value for name, value in metrics.items() if name not in ("split", "examples")}
            plot_confusion(ClassScore(**score), run / PICTURE)


def split_examples(settings: ClassificationSettings) -> tuple[list[Example], list[Example], list[Example]]:
    """Training, validation and test examples: files of their own, or parts of the training file by the seed.

    Equal texts stay on one side.
    """
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"task.{name} must be at least 0 and less than 1, got {getattr(settings, name)}")
    train, val, test = (
        read_examples(path, settings) if path else [] for path in (settings.train, settings.val, settings.test)
    )
    total = len(train)
    generator = np.random.default_rng(settings.split_seed)
    if not test:
        test, train = hold_out(train, round(settings.test_fraction * total), generator)
    if not val:
        val, train = hold_out(train, round(settings.val_fraction * len(train)), generator)
    return train, val, test


def read_examples(path: str, settings: ClassificationSettings) -> list[Example]:
    """The texts and labels of a file; ValueError where one is empty."""
    rows = read_table(path, (settings.text_column, settings.label_column))
    for number, (text, label) in enumerate(rows, 1):
        if not text.strip() or not label.strip():
            raise ValueError(f"{path}: example {number} has an empty {'label' if text.strip() else 'text'}")
    return [(text, label.strip()) for text, label in rows]


def hold_out(
    examples: list[Example], count: int, generator: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """About `count` examples, drawn at random, and the others; examples of one text stay together."""
    groups: dict[str, list[int]] = {}
    for number, (text, _) in enumerate(examples):
        groups.setdefault(text, []).append(number)
    keys = list(groups)
    held: set[int] = set()
    for place in generator.permutation(len(keys)):
        group = groups[keys[place]]
        if len(held) + len(group) <= count:
            held.update(group)
    return [examples[i] for i in sorted(held)], [e for i, e in enumerate(examples) if i not in held]


def label_set(settings: ClassificationSettings, train: Sequence[Example]) -> tuple[str, ...]:
    """The classes in their order."""
    if settings.labels:
        return tuple(label.strip() for label in settings.labels.split(","))
    return tuple(sorted({label for _, label in train}))


def check_classes(train: Sequence[Example], labels: Sequence[str], where: str) -> None:
    """ValueError for labels outside the set, and for a class without an example."""
    if not train:
        raise ValueError(f"{where}: the splits (task.val_fraction, task.test_fraction) leave no example to train on")
    check_labels(train, labels, where)
    counts = Counter(label for _, label in train)
    if empty := [label for label in labels if not counts[label]]:
        raise ValueError(
            f"{where}: no training example has the label {', '.join(map(repr, empty))}; there are: "
            f"{', '.join(f'{label!r} ({n})' for label, n in sorted(counts.items()))}"
        )
    if len(labels) < 2:
        raise ValueError(
            f"{where}: all {len(train)} training examples have the label {labels[0]!r}; wanted two or more"
        )


def check_labels(examples: Sequence[Example], labels: Sequence[str], where: str) -> None:
    """ValueError for a label outside the set, with its text."""
    for text, label in examples:
        if label not in labels:
            raise ValueError(
                f"{where}: the label {label!r} of {text[:40]!r} is not among the classes: "
                f"{', '.join(map(repr, labels))}"
            )


def class_weights(how: str, given: Sequence[str], labels: Sequence[str]) -> tuple[float, ...] | None:
    """The factors on the loss: "none", "balanced" (examples / (classes * examples of the class)), or numbers."""
    if how == "none":
        return None
    if how == "balanced":
        counts = Counter(given)
        return tuple(len(given) / (len(labels) * counts[label]) for label in labels)
    try:
        weights = tuple(float(w) for w in how.split(","))
    except ValueError:
        raise ValueError(f"task.class_weights must be none, balanced, or numbers like 1.0,3.5; got {how!r}") from None
    if len(weights) != len(labels):
        raise ValueError(
            f"task.class_weights has {len(weights)} numbers for {len(labels)} classes ({', '.join(labels)})"
        )
    return weights


def encode(texts: Sequence[str], tokenizer: Tokenizer, model: Classifier) -> list[list[int]]:
    """The ids of each text between the tokens that begin and end one, cut to what the model can read."""
    special = special_ids(tokenizer)
    longest = model.backbone.config.block_size
    out = [special.frame(ids.tolist(), longest) for ids in tokenizer.encode_batch(list(texts))]
    for text, ids in zip(texts, out, strict=True):
        if not ids:
            raise ValueError(f"the text {text[:40]!r} has no tokens")
    return out


@torch.no_grad()
def predict(model: Classifier, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """The probability of each class, (N, K) float32 on the CPU. Nothing is padded."""
    ids = [torch.tensor(row) for row in encode(texts, tokenizer, model)]
    parts = []
    with evaluating(model):
        for i in range(0, len(ids), batch_size):
            packed, cu_seqlens, longest = pack(ids[i : i + batch_size])
            device = model.device
            logits, _ = model(packed.to(device), cu_seqlens=cu_seqlens.to(device), max_seqlen=longest)
            parts.append(logits.float().softmax(-1).cpu())
    return torch.cat(parts)


def evaluate(
    model: Classifier, tokenizer: Tokenizer, examples: Sequence[Example], where: str = "the examples"
) -> ClassScore:
    """The model's score on labelled texts; ValueError for a label that it does not know."""
    labels = model.config.labels
    check_labels(examples, labels, where)
    predicted = predict(model, tokenizer, [text for text, _ in examples]).argmax(1).tolist()
    return score_classes([labels.index(label) for _, label in examples], predicted, labels)
