"""The user's own table of configurations: what `fastlm tune` measured on this machine's GPUs.

A JSON file, {GPU: {kernel: {problem: configuration}}}. An entry counts only where it is still among the candidates.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlm.ops.triton_support.config import Config


def path() -> Path:
    """FASTLM_TUNED, or fastlm/triton.json in the user's cache folder."""
    if os.environ.get("FASTLM_TUNED"):
        return Path(os.environ["FASTLM_TUNED"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "triton.json"


@functools.cache
def table() -> dict[str, Any]:
    """The file's contents; empty where there is none. A broken file is an error that names it."""
    file = path()
    try:
        contents = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{file}: cannot be read ({error}); run `fastlm tune` again, or delete it") from None
    if not isinstance(contents, dict):
        raise RuntimeError(f"{file}: wanted a JSON object; run `fastlm tune` again, or delete it")
    return contents


def lookup(device: torch.device, kernel: str, problem: Hashable, candidates: Sequence[Config]) -> Config | None:
    """The stored configuration of a kernel for a problem on this device."""
    if device.type != "cuda":
        return None
    stored = table().get(torch.cuda.get_device_name(device), {}).get(kernel, {}).get(repr(problem))
    return next((c for c in candidates if c.same(stored)), None) if stored else None


def store(gpu: str, found: dict[str, dict[str, dict[str, Any]]]) -> Path:
    """Add {kernel: {problem: configuration}} of a GPU to the file, replacing it whole (never half written)."""
    contents = dict(table())
    kernels = contents[gpu] = dict(contents.get(gpu, {}))
    for kernel, problems in found.items():
        kernels[kernel] = {**kernels.get(kernel, {}), **problems}
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
    temporary.replace(file)
    table.cache_clear()
    return file
