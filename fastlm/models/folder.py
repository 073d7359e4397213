"""Folders of models that transformers has no name for: config.json with fastlm's own fields, and model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastlm.files import replace_folder, sync


def save_folder(model: nn.Module, path: str | os.PathLike[str], model_type: str, config: dict[str, Any]) -> None:
    """Write a model's parameters and configuration in one step: whole, or what was there before."""
    with replace_folder(Path(path).resolve(), keep=lambda name: True) as new:
        fields = {"model_type": model_type, "config": config}
        (new / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        try:
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} is unchanged: model.safetensors could not be written: {error}") from None
        for file in new.iterdir():
            sync(file)


def read_folder(path: str | os.PathLike[str], model_type: str, meaning: str) -> dict[str, Any]:
    """The configuration in a folder that `save_folder` wrote.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: another kind of model, or a damaged file.
    """
    folder = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a model: it has no {name}")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, config = fields["model_type"], fields.get("config")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {type(error).__name__}: {error}") from None
    if kind != model_type:
        raise ValueError(f"{folder} is a model of the type {kind!r}, wanted {model_type!r} ({meaning})")
    return dict(config)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill the model's parameters from the folder; ValueError where they do not fit or the file is damaged."""
    file_path = Path(path) / "model.safetensors"
    parameters = dict(model.named_parameters())
    try:
        with safe_open(file_path, "pt") as file:
            held = set(file.keys())
            if held != parameters.keys():
                missing, unknown = sorted(parameters.keys() - held), sorted(held - parameters.keys())
                raise ValueError(f"{file_path} is of another model: missing {missing}, unknown {unknown}")
            for name, parameter in parameters.items():
                stored = file.get_tensor(name)
                if stored.shape != parameter.shape:
                    raise ValueError(
                        f"{file_path}: {name} has shape {tuple(stored.shape)}, wanted {tuple(parameter.shape)}"
                    )
                parameter.copy_(stored)
    except SafetensorError as error:
        raise ValueError(f"{file_path} is damaged: {error}") from None
