"""The tasks of `fastlm finetune`: one module each, with a class that begins a run and two methods that end it.

To add a task: a module in `fastlm/tasks/` and its line in TASKS. The module has a class `Task`:
    Settings: a dataclass; its fields are the keys of the config's [task] section, beside `name` and `model`.
    __init__(self, model: Path, settings: Settings, config: RunConfig): read the data, check everything.
    tokenizer, make_model(), open_model(path), loaders(model, group): a `fastlm.training.run.Source`.
    finish(self, run: Path) -> dict: after training, the metrics of the best checkpoint, as JSON can hold them.
    draw(self, run: Path, metrics: dict): the pictures, once the metrics are written.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

from fastlm.files import replace_text
from fastlm.hints import did_you_mean
from fastlm.tasks.epochs import let_steps_count
from fastlm.tasks.pretrained import NEW
from fastlm.training.config import RunConfig, section_from_dict
from fastlm.training.plot import picture_or_note
from fastlm.training.progress import Display, make_display
from fastlm.training.run import (
    RunDoneError,
    Source,
    check_still_there,
    choose_checkpoint,
    continue_run,
    run_config,
    start_run,
)
from fastlm.training.trainer import TrainResult

TASKS = {
    "classification": "fastlm.tasks.classification",
    "text": "fastlm.tasks.text",
    "translation": "fastlm.tasks.translation",
}
METRICS = "metrics.json"
PATHS = ("model", "train", "val", "test")  # the keys in [task] that name files or folders
# What a fine-tuning run has where neither its config nor the command line says otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"lr": 5e-5, "batch_size": 32, "warmup_steps": 20, "schedule": "linear", "min_lr_ratio": 0.0},
    "optimizer": {"beta2": 0.999, "weight_decay": 0.01},
    "evaluation": {"every": 50, "windows": 10_000},
    "checkpoint": {"every": 100, "keep_last": 1},
}


class Task(Source, Protocol):
    """A `Source` that can say at the end how good the model has become."""

    def finish(self, run: Path) -> dict[str, Any]:
        """The metrics of the best checkpoint of the run."""
        ...

    def draw(self, run: Path, metrics: dict[str, Any]) -> None:
        """What is to be seen in the metrics. They are written by then, and an error here is a note."""
        ...


def make_task(config: RunConfig) -> Task:
    """The task that the config's [task] section names.

    Raises:
        ValueError: no such task, no model, a setting that it does not have, or data that do not fit it.
        FileNotFoundError: the model or the data are not there.
    """
    config.task |= {key: os.path.abspath(path) for key, path in _paths(config).items()}  # to go on from any directory
    fields = dict(config.task)
    name, model = fields.pop("name", None), fields.pop("model", None)
    if name is None:
        raise ValueError(f"task.name is missing (--task); the tasks are: {', '.join(TASKS)}")
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{did_you_mean(name, TASKS)}; the tasks are: {', '.join(TASKS)}")
    if not model:
        raise ValueError("task.model is missing: the run, checkpoint or model folder to begin with")
    ignored = [f"model.{key}" for key in config.model if model != NEW]
    ignored += ["training.objective"] * (config.training.objective != "causal") + ["data.path"] * bool(config.data.path)
    if ignored:
        raise ValueError(
            f"{ignored[0]} has no meaning here: a fine-tuned model has the shape and the objective that it comes with "
            "(the model `new` is the exception), and its data are task.train"
        )
    if model == NEW and config.lora.rank:
        raise ValueError(
            f"LoRA trains beside weights that are there; a new model has none, and lora.rank is {config.lora.rank}"
        )
    module = importlib.import_module(TASKS[name])
    return module.Task(Path(model), section_from_dict(module.Task.Settings, "task", fields), config)


def _paths(config: RunConfig) -> dict[str, str]:
    """The files and folders that the [task] section names, by their keys."""
    given = {key: config.task.get(key) for key in PATHS}
    return {k: path for k, path in given.items() if path and isinstance(path, str) and (k, path) != ("model", NEW)}


def finetune(
    config: RunConfig, run: str | Path, *, display: Display | None = None
) -> tuple[TrainResult, dict[str, Any]]:
    """Train the model of the config on its task into a new run folder; its metrics are in `metrics.json` there, too.

    Raises as `make_task` and `fastlm.training.start_run`.
    """
    task = make_task(config)
    result = start_run(config, run, display=display, source=task)
    return result, _finish(task, Path(run), result, display)


def resume(
    run: str | Path, *, overrides: tuple[str, ...] = (), display: Display | None = None
) -> tuple[TrainResult, dict[str, Any]]:
    """Go on with a run of `finetune`, as `fastlm.training.resume_run` does with one of pretraining: exactly.

    A run that came to its end and was killed before its metrics were written gets those.

    Raises:
        FileNotFoundError, ValueError: as `resume_run`, and as `make_task`.
    """
    run = Path(run)
    config = run_config(run, overrides)
    if not config.task:
        raise ValueError(f"{run} is a run of pretraining: go on with it by `fastlm train --resume {run}`")
    let_steps_count(config, overrides)
    check_still_there(run, {f"task.{key}": path for key, path in _paths(config).items()})
    task = make_task(config)
    try:
        result = continue_run(config, run, display=display, source=task)
    except RunDoneError as done:
        if (run / METRICS).is_file():
            raise
        last, best = choose_checkpoint(run, "last"), choose_checkpoint(run, "best")
        result = TrainResult(done.reason, last.step, None, last.val_loss, best.val_loss, 0.0)
    return result, _finish(task, run, result, display)


def _finish(task: Task, run: Path, result: TrainResult, display: Display | None) -> dict[str, Any]:
    """The metrics of a run that has come to its end; none yet of one that a signal stopped."""
    if result.reason.startswith("SIG") or os.environ.get("RANK", "0") != "0":  # of several processes one evaluates
        return {}
    metrics = task.finish(run)
    replace_text(run / METRICS, json.dumps(metrics, indent=1) + "\n")
    with picture_or_note(f"the picture of the metrics in {run}", (display or make_display()).note):
        task.draw(run, metrics)
    return metrics
