"""Shared by all tests: threads, the data folder, and the op suite's matrix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU

from tests import triton_interpreter
from tests.emulator import backend as emulator_backend

triton_interpreter.correct()
emulator_backend.register()  # before op_suite.py reads the list of backends

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):  # the workers share the cores
        torch.set_num_threads(1)


@pytest.fixture
def data() -> Path:
    """The folder with real text and vocabularies; the test is skipped where it is not."""
    folder = Path(os.environ.get("FASTLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set FASTLM_TEST_DATA)")
    return folder
