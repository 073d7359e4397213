"""Every PTX wrapper, by one small kernel each: what it writes is known to the bit. On the emulator always; on a GPU of
compute capability 9.0 where there is one, by the same files and the same numbers."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import build, conformance, gpu_outputs, harness

SOURCES = [f"conformance_{topic}" for topic in ("warp", "sm80", "tma", "wgmma", "cluster")]


@pytest.fixture(scope="module")
def emulated() -> harness.Harness:
    try:
        return harness.load(*SOURCES)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("order", harness.SCHEDULES, ids=lambda o: f"{o[0]}-{o[1]}")
@pytest.mark.parametrize("topic", ["warp", "sm80", "tma", "wgmma", "cluster"])
def test_on_the_emulator(emulated: harness.Harness, topic: str, order: tuple[str, int]) -> None:
    examples = {
        "warp": conformance.warp_examples,
        "sm80": conformance.sm80_examples,
        "tma": conformance.tma_examples,
        "cluster": conformance.cluster_examples,
        "wgmma": lambda: conformance.wgmma_examples([k for k in emulated.index if k.startswith("wgmma_")]),
    }[topic]()
    with harness.schedule(*order):
        for example in examples:
            wrong = conformance.mistake(example, emulated.run(example.case, example.read, example.before))
            assert wrong is None, f"{example}: {wrong}"


def test_every_kernel_has_an_example(emulated: harness.Harness) -> None:
    examples = conformance.all_examples(list(emulated.index))
    assert {e.case for e in examples} == set(emulated.index)


def test_an_example_can_fail(emulated: harness.Harness) -> None:
    for example in conformance.all_examples(list(emulated.index)):
        got = emulated.run(example.case, example.read, example.before)
        got[got.size // 2] ^= 0x40000000
        assert conformance.mistake(example, got) is not None, example


def test_bank_conflicts_of_a_matrix(emulated: harness.Harness) -> None:
    """The rows' addresses, and how often shared memory's 32 banks of 4 bytes must be read for them."""
    row = np.arange(8, dtype=np.uint32)
    cases = [(16 * row, 1), (128 * row, 8), (64 * row, 4), (32 * row, 2), (128 * row + 16 * row, 1), (0 * row, 1)]
    cases += [(128 * (row // 4), 2), (144 * row, 1)]
    for addresses, wanted in cases:
        given = np.ascontiguousarray(addresses, np.uint32).ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        assert emulated.c.harness_wavefronts(given) == wanted, addresses


def test_a_launch_reports_its_conflicts(
    emulated: harness.Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLM_EMULATOR_COUNTS", str(tmp_path / "counts"))
    example = next(e for e in conformance.sm80_examples() if e.case == "ldmatrix_4")
    emulated.run(example.case, example.read, example.before)
    (line,) = (tmp_path / "counts").read_text().splitlines()
    assert json.loads(line) == {"grid": [1, 1, 1], "threads": 32, "dynamic_shared": 0, "matrices": 4, "wavefronts": 4}


@pytest.mark.skipif(not gpu_outputs.PATH.is_file(), reason="no GPU's outputs are recorded")
def test_the_emulator_writes_what_a_gpu_wrote(emulated: harness.Harness) -> None:
    kept = gpu_outputs.recorded()
    for example in conformance.all_examples(list(emulated.index)):
        if str(example) in kept:
            got = emulated.run(example.case, example.read, example.before)
            assert gpu_outputs.agrees(example, got, kept[str(example)]), example


def test_a_changed_word_is_not_what_the_gpu_wrote() -> None:
    for example in [*conformance.warp_examples()][-6:]:
        words = np.ascontiguousarray(example.wanted).view(np.uint32).reshape(-1)
        kept, changed = gpu_outputs.of(example, words), words.copy()
        changed[0] ^= 0x40000000
        assert gpu_outputs.agrees(example, words, kept)
        assert not gpu_outputs.agrees(example, changed, kept)


def test_asm_stands_in_the_wrappers_only() -> None:
    """And launches and shared memory go through csrc/common/cuda: the rest of csrc/ compiles for the emulator."""
    wrappers = build.CSRC / "common" / "cuda"
    for file in sorted(Path(build.CSRC).rglob("*.cu*")) + sorted(Path(build.CSRC).rglob("*.h")):
        if wrappers in file.parents or "emulator" in file.relative_to(build.CSRC).parts:
            continue
        text = file.read_text()
        for forbidden in ("asm volatile", "asm(", "<<<", "__shared__"):
            assert forbidden not in text, f"{file}: {forbidden}"


@pytest.fixture(scope="module")
def compiled_by_nvcc() -> harness.Harness:
    try:
        return harness.load_for_gpu(*SOURCES)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def test_nvcc_compiles_every_kernel(compiled_by_nvcc: harness.Harness, emulated: harness.Harness) -> None:
    """ptxas has read every wrapper's instruction."""
    assert set(compiled_by_nvcc.index) == set(emulated.index)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no GPU of compute capability 9.0",
)
def test_on_a_gpu(compiled_by_nvcc: harness.Harness) -> None:
    for example in conformance.all_examples(list(compiled_by_nvcc.index)):
        wrong = conformance.mistake(example, compiled_by_nvcc.run(example.case, example.read, example.before))
        assert wrong is None, f"{example}: {wrong}"
