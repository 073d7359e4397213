"""Every PTX wrapper, by one small kernel each: what it writes is known to the bit. On the emulator always; on a GPU of
compute capability 9.0 where there is one, by the same files and the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.emulator import build, conformance, harness

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
