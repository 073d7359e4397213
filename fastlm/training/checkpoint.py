"""Checkpoints that a crash cannot damage.

    checkpoints/
      step-00000500/
        model/               GPT.save_pretrained(format="fastlm"): config.json, model.safetensors
        state.pt             optimizer, RNG of every device, data position, step, and the rest that exact resuming needs
        checkpoint.json      step, validation loss, and the size of every file; written last
A checkpoint is written under a temporary name, every file and folder is flushed to the disk, and only then it gets
its name. One that is removed loses that name first: what has it is whole, unless its files were damaged from outside.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm.files import sync

INFO = "checkpoint.json"
STATE = "state.pt"
MODEL = "model"
_PREFIX = "step-"
_TEMPORARY = ".tmp-"


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    path: Path
    step: int
    val_loss: float | None

    @property
    def model_path(self) -> Path:
        """The folder for `GPT.from_pretrained`."""
        return self.path / MODEL

    def load_state(self) -> dict[str, Any]:
        """What is beside the weights, on the CPU. Raises ValueError where the file is damaged."""
        try:
            return torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
            # UnpicklingError goes on for lines with advice to load the file as a program: not here.
            reason = "not what was written" if isinstance(e, pickle.UnpicklingError) else str(e)
            raise ValueError(f"{self.path / STATE} is damaged: {reason}") from None


def find_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """The whole checkpoints in a `checkpoints` folder, by step; the leftovers of an interrupted save are none."""
    found = []
    for path in _step_folders(folder):
        with contextlib.suppress(FileNotFoundError, ValueError):  # damaged, or removed since the folder was read
            found.append(open_checkpoint(path))
    return found


def find_checkpoint(folder: str | Path, which: str) -> Checkpoint | None:
    """The "last" checkpoint in a `checkpoints` folder, or the "best" (the last, where none has a validation loss).

    Raises:
        FileNotFoundError, ValueError: that one is damaged. What the others are like does not matter.
    """
    while paths := _step_folders(folder):
        path = (_best(paths) if which == "best" else None) or paths[-1]
        try:
            return open_checkpoint(path)
        except (FileNotFoundError, ValueError):
            if os.path.lexists(path):
                raise
            # A training that is running has removed it since the folder was read, and had written another one before.
    return None


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss (the earliest of equals); None where none has any."""
    measured = [c for c in checkpoints if c.val_loss is not None]
    return min(measured, key=lambda c: c.val_loss or 0.0, default=None)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Check that a checkpoint is whole: every file is there and as long as when it was written.

    Raises:
        FileNotFoundError: no checkpoint there, or a file of it is missing.
        ValueError: a file is truncated or the list is damaged.
    """
    checkpoint, files = _read_info(Path(path))
    for name, size in files.items():
        if not (checkpoint.path / name).is_file():
            raise FileNotFoundError(f"the checkpoint {path} is incomplete: {name} is missing")
        got = (checkpoint.path / name).stat().st_size
        if got != size:
            raise ValueError(
                f"the checkpoint {path} is damaged: {name} has {got:,} bytes, it was written with {size:,}"
            )
    return checkpoint


def _step_folders(folder: str | Path) -> list[Path]:
    """By step, which their names end with; some may be gone already."""
    steps = {p: p.name.removeprefix(_PREFIX) for p in Path(folder).glob(f"{_PREFIX}*") if not p.is_file()}
    return sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))


def _best(paths: list[Path]) -> Path | None:
    """By what the checkpoints say of themselves: whether their files are there is another question."""
    listed = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError, ValueError):
            listed.append(_read_info(path)[0])
    best = best_checkpoint(listed)
    return None if best is None else best.path


def _read_info(path: Path) -> tuple[Checkpoint, dict[str, int]]:
    """A checkpoint as its `checkpoint.json` has it, and the sizes of its files."""
    if not (path / INFO).is_file():
        raise FileNotFoundError(f"{path} is not a whole checkpoint: it has no {INFO}")
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
        return Checkpoint(path, int(info["step"]), info["val_loss"]), dict(info["files"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path / INFO} is damaged: {type(e).__name__}: {e}") from None


class CheckpointWriter:
    """Saves checkpoints in the background: training goes on as soon as the tensors are copied.

    Args:
        folder: the `checkpoints` folder.
        keep_last: how many of the newest stay.
        keep_best: whether the one with the lowest validation loss stays as well.
        clean: remove what a save that was killed left behind. With several processes, the one that writes.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 2, keep_best: bool = True, clean: bool = True):
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Copies on the CPU from which the thread writes. They are kept: new memory costs more than the copying.
        self._shadow: torch.nn.Module | None = None
        self._state: Any = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if clean:
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def prepare(self, model: torch.nn.Module) -> None:
        """Make room for the copies: before the first save, or before the model is sharded."""
        self._shadow = copy.deepcopy(model).cpu()

    def save(
        self,
        model: torch.nn.Module,
        state: dict[str, Any],
        step: int,
        val_loss: float | None,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Copy the weights and the state, and write them in the background.

        Args:
            weights: the model's state dict, where it cannot give it itself (a sharded one).

        Raises:
            CheckpointError: the save before this one failed (a full disk, say); the checkpoints before it are whole.
        """
        self.wait()
        if self._shadow is None:
            self.prepare(model)
        assert self._shadow is not None
        self._shadow.load_state_dict(model.state_dict() if weights is None else weights)
        self._state = copied(state, self._state)
        arguments = (self._shadow, self._state, step, val_loss)
        self._thread = threading.Thread(target=self._write_noting_errors, args=arguments, name="fastlm-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what `save` raises."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}; the ones before it are whole"
            ) from error

    def _write_noting_errors(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
            self._prune()
        except Exception as e:  # handed to the training thread by wait()
            self._error = e

    def _write(self, model: Any, state: dict[str, Any], step: int, val_loss: float | None) -> None:
        final = self.folder / f"{_PREFIX}{step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            model.save_pretrained(temporary / MODEL, format="fastlm")  # holds every option, and all bits
            torch.save(state, temporary / STATE)
            files = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
            info = {"step": step, "val_loss": val_loss, "files": files}
            (temporary / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            if final.exists():
                self._remove(final)
            os.replace(temporary, final)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _prune(self) -> None:
        checkpoints = find_checkpoints(self.folder)
        keep = {c.step for c in checkpoints[-self.keep_last :]}
        best = best_checkpoint(checkpoints)
        if self.keep_best and best is not None:
            keep.add(best.step)
        for checkpoint in checkpoints:
            if checkpoint.step not in keep:
                self._remove(checkpoint.path)

    def _remove(self, path: Path) -> None:
        """First its name, then its files: a kill in between, and who reads the folder now, find no half of it."""
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        os.replace(path, doomed)
        sync(self.folder)
        shutil.rmtree(doomed)


def rng_state() -> dict[str, Any]:
    """The state of every generator that training may draw from: Python, NumPy, torch on the CPU and on each GPU."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back; the GPUs that were there then and are here now."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)


def copied(value: Any, before: Any = None) -> Any:
    """A nested structure with every tensor copied to the CPU, so that training may go on with the originals.

    Args:
        before: an earlier copy: its tensors are written over where they fit.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if isinstance(before, torch.Tensor) and (before.shape, before.dtype) == (value.shape, value.dtype):
            return before.copy_(value)
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return {k: copied(v, old.get(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        olds = before if isinstance(before, (list, tuple)) and len(before) == len(value) else [None] * len(value)
        return type(value)(copied(v, o) for v, o in zip(value, olds, strict=True))
    return value
