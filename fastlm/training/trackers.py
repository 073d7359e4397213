"""Optional adapters that show the numbers of log.jsonl elsewhere: TensorBoard, wandb, trackio."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from fastlm.training.config import LoggingConfig


class Tracker(Protocol):
    """One place to which numbers go."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def check_installed(config: LoggingConfig) -> None:
    """ValueError where the package of an adapter that the config asks for is not installed."""
    for name in ("tensorboard", "wandb", "trackio"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"logging.{name} needs the package {name}: pip install {name}")


def make_trackers(config: LoggingConfig, run: Path, settings: dict[str, Any]) -> list[Tracker]:
    """The adapters that the config asks for; `check_installed` has found their packages."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(run))
    for name in ("wandb", "trackio"):  # trackio has wandb's interface
        if getattr(config, name):
            trackers.append(_WandbLike(name, config.project, run, settings))
    return trackers


class _TensorBoard:
    def __init__(self, run: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class _WandbLike:
    def __init__(self, package: str, project: str, run: Path, settings: dict[str, Any]):
        self._module: Any = importlib.import_module(package)
        options = {"dir": str(run)} if package == "wandb" else {}  # where its files go, offline (WANDB_MODE) too
        self._module.init(project=project, name=run.name, config=settings, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()
