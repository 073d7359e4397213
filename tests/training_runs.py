"""Tiny datasets and settings for the tests of training, evaluation and the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastlm.data import CharTokenizer, write_dataset
from fastlm.training.config import RunConfig, config_from_dict
from fastlm.training.progress import PlainDisplay

SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are fastest on one thread, and do not disturb each other then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Within it the system refuses to write beyond `size` bytes of a file, in the middle, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_tiny_dataset(folder: Path, *, val: bool = True) -> Path:
    """Sentences by characters: 28 of them and the end of text, and a loss that falls within a few steps."""
    pieces = [("train", SENTENCE * 40, True)] + ([("val", SENTENCE * 10, True)] if val else [])
    write_dataset(iter(pieces), folder, CharTokenizer(SENTENCE))
    return folder


def tiny_config(dataset: Path, **sections: dict[str, Any]) -> RunConfig:
    """A model of some thousand parameters with dropout, two batches a step, a checkpoint every three steps."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1},
        "data": {"path": str(dataset)},
        "training": {"steps": 12, "batch_size": 4, "grad_accum": 2, "lr": 1e-2, "warmup_steps": 2, "device": "cpu"},
        "evaluation": {"every": 4, "windows": 8},
        "checkpoint": {"every": 3, "keep_last": 10},
    }
    for name, table in sections.items():
        tables[name] = {**tables.get(name, {}), **table}
    return config_from_dict(tables)


def quiet() -> PlainDisplay:
    return PlainDisplay(Console(quiet=True))
