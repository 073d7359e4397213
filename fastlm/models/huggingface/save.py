"""`save_pretrained`: a model as a folder that transformers loads, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastlm.files import replace_folder, sync
from fastlm.models.config import GPTConfig
from fastlm.models.encoder import Encoder
from fastlm.models.gpt import GPT
from fastlm.models.huggingface.configs import config_to_huggingface
from fastlm.models.huggingface.encoder_configs import OWN, encoder_config_to_huggingface
from fastlm.models.huggingface.load import ADAPTER, INDEX, WEIGHTS
from fastlm.models.huggingface.names import full, sources
from fastlm.nn.lora import LoRALinear

MODEL_FILES = re.compile(r"config\.json|.*\.safetensors|.*\.safetensors\.index\.json|pytorch_model.*|" + ADAPTER)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# a tensor to write: its name in the file, its shape, and how to get it
Entry = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def save_pretrained(
    model: GPT | Encoder,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    format: str = "huggingface",
    dtype: torch.dtype | None = None,
    extra_config: dict[str, Any] | None = None,
) -> None:
    """Write config.json and safetensors to a folder.

    The folder is written under a temporary name beside `path`, flushed to the disk, and put in place in one step: a
    crash, a full disk or a kill at any moment leaves what was there before, or the whole new model. Other files of an
    existing model folder (a tokenizer) are kept.

    Args:
        path: the folder: a new one, an empty one, or one that holds a model, which is replaced.
        max_shard_size: bytes, or a number with a unit ("500MB"): larger models are split into files of up to this size.
        format: "huggingface": as GPT-2, Llama, Mistral, Qwen2 or Qwen3, for transformers and whatever reads its folders
            (GPT-2 has all biases: those that the model lacks are written as zeros), or as BERT or RoBERTa; "fastlm":
            any configuration, for `from_pretrained` of fastlm's models only; LoRA adapters lie in `adapter/` beside.
        dtype: to store the weights in; default: as they are.
        extra_config: more fields for config.json, e.g. `{"eos_token_id": 50256}`.

    Raises:
        ValueError: transformers has no architecture for this model (the message says what is in the way), or
            `max_shard_size` is no size.
        FileExistsError: `path` is a file, or a folder of something else than a model.
        OSError: the disk is full; nothing has changed.
    """
    if format not in ("huggingface", "fastlm"):
        raise ValueError(f"format must be 'huggingface' or 'fastlm', got {format!r}")
    if format == "fastlm":
        own = "fastlm" if isinstance(model.config, GPTConfig) else OWN
        fields: dict[str, Any] = {"model_type": own, "config": model.config.to_dict()}
    elif isinstance(model.config, GPTConfig):
        fields = config_to_huggingface(model.config)
    else:
        fields = encoder_config_to_huggingface(model.config)
    unmerged = any(isinstance(m, LoRALinear) and not m.merged for m in model.modules())
    if unmerged and format != "fastlm":
        raise ValueError(
            "this model has LoRA adapters beside its weights: merge them first (fastlm.models.lora.merge), save them "
            "alone (fastlm.models.lora.save_lora), or save both with format='fastlm'"
        )
    stored = dtype or model.wte.weight.dtype
    fields = {**fields, "torch_dtype": str(stored).removeprefix("torch."), **(extra_config or {})}
    entries = _entries(model, fields["model_type"], stored)
    shards = _shards(entries, _parse_size(max_shard_size), stored.itemsize)

    folder = Path(path).resolve()
    _check_folder(folder)
    total = sum(_numel(shape) for _, shape, _ in entries) * stored.itemsize
    with replace_folder(folder, keep=lambda name: not MODEL_FILES.fullmatch(name)) as new:
        free = shutil.disk_usage(new).free
        if free < total:
            raise OSError(f"{folder}: the model takes {total:,} bytes, and {free:,} are free; nothing was written")
        _write_json(new / "config.json", fields)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            try:
                save_file({entry: get() for entry, _, get in shard}, new / name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder} is unchanged: {name} could not be written: {error}") from None
            sync(new / name)
            weight_map |= {entry: name for entry, _, _ in shard}
        if unmerged:
            from fastlm.models.lora import write_adapters  # it reads names of this package

            write_adapters(model, new / ADAPTER)
        if len(shards) > 1:
            _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _entries(model: GPT | Encoder, kind: str, dtype: torch.dtype) -> list[Entry]:
    """All tensors of the file, in the order of the model."""
    state = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    if kind == "gpt2":
        shapes = _with_biases(shapes)
    entries: list[Entry] = []
    for name, source in sources(model.config, kind, shapes).items():
        start = 0
        for part, rows, shape in zip(source.names, source.rows, source.stored_shapes, strict=True):
            get = _getter(state.get(name), start, rows, source.transposed, shape, dtype)
            entries.append((full(part, kind), shape, get))
            start += rows
    return entries


def _getter(
    parameter: Tensor | None, start: int, rows: int, transposed: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Makes the tensor when it is its turn, so that only one file's worth is in memory twice."""

    def get() -> Tensor:
        if parameter is None:
            return torch.zeros(shape, dtype=dtype)
        part = parameter.detach()[start : start + rows]
        part = part.T if transposed else part
        return part.to("cpu", dtype).clone(memory_format=torch.contiguous_format)

    return get


def _with_biases(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that the model would have if all its norms and linear layers had biases."""
    complete = {}
    for name, shape in shapes.items():
        complete[name] = shape
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and not name.startswith(("wte", "wpe", "lm_head")):
            complete[bias] = shape[:1]
    return complete


def _shards(entries: list[Entry], most: int, itemsize: int) -> list[list[Entry]]:
    """Split into files of up to `most` bytes; a tensor that is larger has a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = _numel(entry[1]) * itemsize
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    return shards


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size must be bytes or a size such as '5GB' or '500MB', got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder to save to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} holds something else than a model (it has no config.json); give a new folder")


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    sync(file)
