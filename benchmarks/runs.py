"""The runs that are kept as evidence: each is a few commands, whose results go to docs/results and to docs/runs.md.

    python benchmarks/runs.py --data ../shared/data shakespeare          # one of the runs, or several
    python benchmarks/runs.py --data ../shared/data all
    python benchmarks/runs.py --data ../shared/data wikitext2 --set training.steps=20    # to try it; nothing is kept

What is trained lies under `runs/evidence` (ignored by git) and is made anew each time. fastlm is installed,
or the checkout is in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.bench import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "runs.md"
WORK = "runs/evidence"


@dataclass(frozen=True)
class Run:
    """Commands with {data} and {work}; those that start with "fastlm train" or "fastlm finetune" take --set.

    Args:
        commands: the last line of JSON that one prints is its result, under the name before the colon.
    """

    title: str
    commands: tuple[str, ...]
    note: str = ""


SHAKESPEARE = (
    "fastlm prepare {data}/text/tinyshakespeare.txt --out {work}/shakespeare-char --tokenizer chars --overwrite"
)
WIKITEXT = (
    "fastlm prepare {data}/text/wikitext-2.train.txt --val-input {data}/text/wikitext-2.valid.txt"
    " --out {work}/wikitext2 --tokenizer {data}/gpt2 --overwrite"
)
RUNS = {
    "shakespeare": Run(
        "tinyshakespeare by characters, nanoGPT's recipe for a CPU",
        (
            SHAKESPEARE,
            "fastlm train --config recipes/shakespeare-char-cpu.toml --data {work}/shakespeare-char"
            " --out {work}/shakespeare",
            "sliding window: fastlm evaluate {work}/shakespeare --data {work}/shakespeare-char --json",
        ),
        "nanoGPT publishes a validation loss of 1.88 for it. The validation loss of the run is over windows of 64"
        " characters that do not overlap; the sliding window gives each character at least 32 before it.",
    ),
    "shakespeare-gpu": Run(
        "tinyshakespeare by characters, nanoGPT's full recipe (for a GPU)",
        (
            SHAKESPEARE,
            "fastlm train --config recipes/shakespeare-char-gpu.toml --data {work}/shakespeare-char"
            " --out {work}/shakespeare-gpu",
            "sliding window: fastlm evaluate {work}/shakespeare-gpu --data {work}/shakespeare-char --json",
        ),
        "nanoGPT publishes a validation loss of 1.4697 for it.",
    ),
    "wikitext2": Run(
        "WikiText-2 with GPT-2's vocabulary: one epoch of a small model, and HellaSwag",
        (
            WIKITEXT,
            "fastlm train --config recipes/wikitext2.toml --data {work}/wikitext2 --out {work}/wikitext2-run",
            "sliding window: fastlm evaluate {work}/wikitext2-run --data {work}/wikitext2 --json",
            "HellaSwag: fastlm evaluate {work}/wikitext2-run --choices {data}/eval/hellaswag_val_1k.jsonl --json",
        ),
        "HellaSwag: the first 1,000 questions of its validation set, four endings each; chance is 0.25, and a model of"
        " this size after one epoch knows little more.",
    ),
    "lstm": Run(
        "An LSTM and a GPT of equal parameters and equal arithmetic",
        (
            SHAKESPEARE,
            "fastlm train --config recipes/shakespeare-char-cpu.toml --data {work}/shakespeare-char"
            " --out {work}/lstm-gpt",
            "fastlm train --config recipes/lstm-shakespeare-char.toml --data {work}/shakespeare-char --out {work}/lstm",
            "GPT: fastlm evaluate {work}/lstm-gpt --data {work}/shakespeare-char --json",
            "LSTM: fastlm evaluate {work}/lstm --data {work}/shakespeare-char --json",
        ),
        "The LSTM's state goes through the whole validation text; the GPT sees 64 characters at most.",
    ),
    "translation": Run(
        "English to French: a causal model with the source as its prompt, and an encoder-decoder",
        tuple(
            f"{kind}: fastlm finetune new --task translation --config recipes/translation-{kind}.toml"
            " --train {data}/translation/tatoeba.eng-fra.train.tsv --val {data}/translation/tatoeba.eng-fra.valid.tsv"
            f" --out {{work}}/translation-{kind}"
            for kind in ("decoder", "encoder-decoder")
        ),
        "BLEU and chrF on the 1,000 validation pairs; copy_: the source as its own translation; frequent_: the training"
        " target that occurs most often.",
    ),
    "nanogpt": Run(
        "fastlm and eager PyTorch train nanoGPT's model in one run, in turns",
        ("python benchmarks/nanogpt.py {data}/text/tinyshakespeare.txt --out docs/results/nanogpt-curves.json",),
        "The time is that of the training steps alone.",
    ),
    "io": Run(
        "Loader, prepare, checkpoints and batched generation",
        ("python -m fastlm.bench.io {data}/text/wikitext-2.train.txt --out docs/results/io-raw.json",),
    ),
    "lstm-layer": Run(
        "The LSTM layer against nn.LSTM in eager PyTorch, forward and backward",
        ("python -m fastlm.bench.lstm --out docs/results/lstm-layer-raw.json",),
    ),
}


def execute(name: str, data: str, settings: Sequence[str]) -> dict[str, Any]:
    """Run the commands of one run; what they took and said."""
    environment = report.environment()
    steps = []
    for line in RUNS[name].commands:
        label, _, command = line.rpartition(": ")
        command = command.format(data=data, work=WORK)
        words = command.split()
        if words[:2] in (["fastlm", "train"], ["fastlm", "finetune"]):
            shutil.rmtree(ROOT / words[words.index("--out") + 1], ignore_errors=True)
            words += [word for s in settings for word in ("--set", s)]
        words = [sys.executable, "-m", "fastlm", *words[1:]] if words[0] == "fastlm" else [sys.executable, *words[1:]]
        print(f"$ {command}", flush=True)
        began = time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            raise SystemExit(f"{command}: exit code {done.returncode}")
        step = {"command": command, "label": label, "seconds": time.perf_counter() - began, **found(command)}
        if command.endswith("--json"):
            step["result"] = json.loads(done.stdout.strip().splitlines()[-1])
        elif not step.get("result"):
            step["output"] = done.stdout.strip()
        steps.append(step)
    return {"name": name, "environment": environment, "steps": steps}


def found(command: str) -> dict[str, Any]:
    """What a training left in its folder: the end of its log, and the metrics of a task."""
    words = command.split()
    if words[:2] not in (["fastlm", "train"], ["fastlm", "finetune"]):
        return {}
    from fastlm.training.journal import read_journal

    run = ROOT / words[words.index("--out") + 1]
    records = read_journal(run / "log.jsonl")
    start, end = records[0], records[-1]
    losses = [r["val_loss"] for r in records if r["kind"] == "eval"]
    result: dict[str, Any] = {
        "parameters": start["parameters"],
        "steps": end["step"],
        "tokens_per_second": end["tokens_per_second"],
        "last_val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses, default=None),
    }
    if (run / "metrics.json").is_file():
        result |= json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {"result": result}


def write_page() -> None:
    """docs/runs.md from all results that are there."""
    lines = ["# Runs", "", "Made by `benchmarks/runs.py`; the numbers with all their digits are in `docs/results`.", ""]
    for name, run in RUNS.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        where = content["environment"]
        device = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
        lines += [f"## {run.title}", ""]
        lines += [f"`python benchmarks/runs.py --data ../shared/data {name}`", ""] + (
            [run.note, ""] if run.note else []
        )
        lines += [
            f"{device}; torch {where['versions']['torch']}, commit {where['commit']}, {where['date'][:10]},"
            f" load average {where['load_average']:.1f} at the start.",
            "",
        ]
        for step in content["steps"]:
            lines += ["```sh", step["command"], "```", f"{step['seconds']:.0f} s in all.", ""]
            if step.get("result"):
                lines += ["| | |", "|---|---|"]
                lines += [f"| {k.replace('_', ' ')} | {shown(v)} |" for k, v in step["result"].items()] + [""]
            elif step.get("output") and not step["command"].startswith("fastlm"):
                lines += ["```", step["output"], "```", ""]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def shown(value: Any) -> str:
    """A number as a table has it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "<br>".join(" → ".join(map(str, v)) if isinstance(v, list) else shown(v) for v in value)
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help=f"{', '.join(RUNS)}, or all (but the one for a GPU)")
    parser.add_argument(
        "--data", default="../shared/data", help="has text/, gpt2/, eval/, translation/: docs/training.md"
    )
    parser.add_argument("--set", action="append", default=[], help="a setting for the trainings; then nothing is kept")
    options = parser.parse_args()
    names = [n for n in RUNS if n != "shakespeare-gpu"] if options.runs == ["all"] else options.runs
    for name in names:
        if name not in RUNS:
            parser.error(f"there is no run {name!r}; the runs are: {', '.join(RUNS)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    data = os.path.relpath(options.data, ROOT)  # as it is recorded; the commands run in ROOT
    for name in names:
        result = execute(name, data, options.set)
        if not options.set:
            (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            write_page()


if __name__ == "__main__":
    main()
