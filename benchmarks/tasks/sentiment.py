"""Sentiment of single sentences: what pretraining is worth, from one command, with naive Bayes beside it.

    python benchmarks/tasks/sentiment.py --data ../shared/data --minilm FOLDER --out runs/sentiment

3,000 sentences (Kotzias et al. 2015; sentiment/uci_sentences.tsv), 600 of them for the test by a fixed seed, equal
sentences on one side. A small masked and a small causal model are trained on WikiText-2 (the recipes
wikitext2-masked-small and wikitext2-causal-small), then fine-tuned, beside the same shapes with new weights, under
several seeds; all-MiniLM-L6-v2 is fine-tuned in full and by LoRA. What is there already in --out is not run again.
Writes sentiment.json and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.evaluation.classes import score_classes
from fastlm.tasks.classification import ClassificationSettings, split_examples
from fastlm.training.journal import read_journal

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="has sentiment/ and text/")
    parser.add_argument("--minilm", type=Path, help="all-MiniLM-L6-v2's folder; without it these runs are left out")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    parser.add_argument("--seeds", type=int, default=10, help="of the small models' fine-tuning")
    args = parser.parse_args()
    sentences = args.data / "sentiment" / "uci_sentences.tsv"
    rows: dict[str, list[dict[str, Any]]] = {"naive Bayes, uni- and bigrams": [naive_bayes(sentences)]}

    dataset = args.out / "wikitext2"
    if not dataset.exists():
        text = [str(args.data / "text" / f"wikitext-2.{part}.txt") for part in ("train", "valid")]
        vocabulary = ("--tokenizer", "bpe", "--vocab-size", "4096")
        fastlm("prepare", text[0], "--val-input", text[1], *vocabulary, "--out", str(dataset))
    pretraining = {}
    for kind in ("masked", "causal"):
        run = args.out / kind
        if not run.exists():
            fastlm("train", "--config", recipe(f"wikitext2-{kind}-small"), "--data", str(dataset), "--out", str(run))
        pretraining[kind] = summary(run)
        for start in ("from scratch", "pretrained"):
            options = ("--set", f"task.from_scratch={str(start == 'from scratch').lower()}")
            rows[f"small {kind} model, {start}"] = [
                finetuned(args.out / f"{kind}-{start.replace(' ', '-')}-{seed}", run, "sentiment-small", sentences,
                          *options, "--set", f"training.seed={seed}")
                for seed in range(args.seeds)
            ]  # fmt: skip
    if args.minilm:
        for name, options in (
            ("all weights", ()),
            ("LoRA of rank 8", ("--lora-rank", "8", "--set", "training.lr=1e-3")),
        ):
            run = args.out / f"minilm-{name.replace(' ', '-')}"
            rows[f"MiniLM, {name}"] = [finetuned(run, args.minilm, "sentiment-minilm", sentences, *options)]

    machine = f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    gains = {
        kind: gain(rows[f"small {kind} model, pretrained"], rows[f"small {kind} model, from scratch"])
        for kind in pretraining
    }
    result = {"machine": machine, "pretraining": pretraining, "rows": rows, "gains": gains}
    (args.out / "sentiment.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    for kind, (mean, low, high) in gains.items():
        print(f"pretraining gives the small {kind} model {mean:+.3f} of accuracy ({low:+.3f} to {high:+.3f})")


def gain(after: list[dict[str, Any]], before: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The mean difference in accuracy under equal seeds, and its 95 % interval: the bootstrap over the seeds."""
    differences = np.array([a["accuracy"] - b["accuracy"] for a, b in zip(after, before, strict=True)])
    means = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def finetuned(run: Path, model: Path, config: str, sentences: Path, *options: str) -> dict[str, Any]:
    """The metrics of a fine-tuning run, which is made unless it is there."""
    if not (run / "metrics.json").exists():
        fastlm(
            "finetune", str(model), "--config", recipe(config), "--train", str(sentences), "--out", str(run), *options
        )
    return {**json.loads((run / "metrics.json").read_text(encoding="utf-8")), **summary(run)}


def summary(run: Path) -> dict[str, Any]:
    """Steps, speed, parameters and the best validation loss of a run, from its log."""
    records = read_journal(run / "log.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    tokens = sum(r["tokens"] for r in steps)
    return {
        "parameters": records[0]["parameters"],
        "steps": steps[-1]["step"],
        "tokens": tokens,
        "tokens_per_second": records[-1]["tokens_per_second"],
        "best_val_loss": min(r["val_loss"] for r in records if r["kind"] == "eval"),
    }


def naive_bayes(sentences: Path) -> dict[str, Any]:
    """Multinomial naive Bayes over words and pairs of words, add-one smoothing. Learns from training and validation."""
    settings = ClassificationSettings(train=str(sentences), test_fraction=0.2, val_fraction=0.1)
    train, val, test = split_examples(settings)
    labels = ("0", "1")
    counts = {
        label: Counter(f for text, given in train + val if given == label for f in features(text)) for label in labels
    }
    prior = Counter(label for _, label in train + val)
    vocabulary = len(counts["0"].keys() | counts["1"].keys())
    total = {label: sum(counts[label].values()) + vocabulary for label in labels}

    def score(text: str, label: str) -> float:
        known = [f for f in features(text) if f in counts["0"] or f in counts["1"]]
        likelihood = sum(math.log((counts[label][f] + 1) / total[label]) for f in known)
        return math.log(prior[label]) + likelihood

    predicted = [int(score(text, "1") > score(text, "0")) for text, _ in test]
    found = score_classes([int(label) for _, label in test], predicted, labels)
    return {"split": "test", "examples": len(test), **vars(found)}


def features(text: str) -> list[str]:
    words = re.findall(r"[a-z']+|[!?]", text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: means over the seeds; the intervals are the bootstrap over the sentences."""
    lines = ["| model | accuracy | 95 % interval | macro-F1 | runs |", "|---|---|---|---|---|"]
    for name, runs in rows.items():
        accuracy, f1 = (float(np.mean([run[key] for run in runs])) for key in ("accuracy", "macro_f1"))
        low, high = (float(np.mean([run["accuracy_interval"][end] for run in runs])) for end in (0, 1))
        lines.append(f"| {name} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {f1:.3f} | {len(runs)} |")
    return "\n".join(lines)


def recipe(name: str) -> str:
    return str(RECIPES / f"{name}.toml")


def fastlm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "fastlm", *arguments], check=True)


if __name__ == "__main__":
    main()
