"""Where the model and the tokenizer of a run, a checkpoint or a model folder are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastlm.models.huggingface.load import HOW_TO_DOWNLOAD
from fastlm.training.checkpoint import INFO, open_checkpoint
from fastlm.training.run import CONFIG, choose_checkpoint

Model = TypeVar("Model")


def load_found(path: Path, which: str, load: Callable[[Path], Model]) -> tuple[Model, Path, Path]:
    """What `load` makes of the folder of the weights, that folder, and the tokenizer's; arguments as `find_model`.

    A run that is training removes its old checkpoints. Where it does so before `load` is done, the next one is loaded.
    """
    while True:
        weights, tokenizer = find_model(path, which)
        try:
            return load(weights), weights, tokenizer
        except Exception:  # the system, torch and safetensors each have their own for a file that is gone
            if weights.exists():
                raise


def find_model(path: Path, which: str = "best") -> tuple[Path, Path]:
    """The folders of the weights and of the tokenizer.

    Args:
        path: a run folder, a checkpoint in one, or a Hugging Face model folder.
        which: which checkpoint of a run: "best" or "last".
    """
    if not path.is_dir():
        raise FileNotFoundError(
            f"no such folder: {path} (wanted a run, a checkpoint, or a model folder). {HOW_TO_DOWNLOAD}"
        )
    if (path / CONFIG).is_file():
        return choose_checkpoint(path, which).model_path, path / "tokenizer"
    if (path / INFO).is_file():
        return open_checkpoint(path).model_path, path.resolve().parent.parent / "tokenizer"
    if (path / "config.json").is_file():
        return path, path
    raise FileNotFoundError(f"{path} is no run ({CONFIG}), no checkpoint ({INFO}) and no model folder (config.json)")


def check_vocabulary(known: int, ids: int, model: Path, tokenizer: Path) -> None:
    """ValueError where a tokenizer gives ids that the model does not know."""
    if ids > known:
        raise ValueError(
            f"the tokenizer {tokenizer} has {ids} ids, "
            f"the model {model} knows only {known}: they do not belong together"
        )
