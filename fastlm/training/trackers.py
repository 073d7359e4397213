"""Optional adapters that show the numbers of log.jsonl elsewhere: TensorBoard, wandb, trackio."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fastlm.training.config import LoggingConfig


class Tracker(Protocol):
    """One place to which numbers go."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def make_trackers(config: LoggingConfig, run: Path, settings: dict[str, Any]) -> list[Tracker]:
    """The adapters that the config asks for; ValueError where the package of one is not installed."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(run))
    for name in ("wandb", "trackio"):  # trackio has wandb's interface
        if getattr(config, name):
            trackers.append(_WandbLike(name, config.project, run, settings))
    return trackers


class _TensorBoard:
    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("logging.tensorboard needs the package tensorboard: pip install tensorboard") from None
        self._writer = SummaryWriter(str(run / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class _WandbLike:
    def __init__(self, package: str, project: str, run: Path, settings: dict[str, Any]):
        import importlib

        try:
            self._module: Any = importlib.import_module(package)
        except ImportError:
            raise ValueError(f"logging.{package} needs the package {package}: pip install {package}") from None
        self._module.init(project=project, name=run.name, config=settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()
