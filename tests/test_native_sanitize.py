"""The C++ kernels for CPUs: AddressSanitizer and UBSan on small odd cases, ThreadSanitizer on several threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastlm import _C
from tests.native import build
from tests.native.build import ADDRESS, CASES, HERE, Variant

THREAD = ("-fsanitize=thread", "-O1")

pytestmark = pytest.mark.skipif(shutil.which("objcopy") is None, reason="no objcopy")


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_cpu_kernels_are_clean(isa: str) -> None:
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    flags = build.toolchain.instruction_sets()[isa]
    cases = build.program(Variant(f"address-{isa}", (*flags, *ADDRESS)), [*CASES, *build.kernels()])
    build.run([cases, "small"], ASAN_OPTIONS="detect_leaks=0")


def thread_variant() -> Variant:
    best = [isa for isa in _C.cpu_isas() if isa != "avx512_bf16"][-1]  # the widest vectors run fastest
    return Variant("thread", (*build.toolchain.instruction_sets()[best], *THREAD))


def test_threads_touch_nothing_of_each_other(tmp_path: Path) -> None:
    """And 1, 2 and 3 threads give the same bits."""
    cases = build.program(thread_variant(), [*CASES, HERE / "threads.cpp", *build.kernels()])
    for threads in ("1", "2", "3"):
        build.run([cases, "large", tmp_path / threads], OMP_NUM_THREADS=threads)
    alone = (tmp_path / "1").read_bytes()
    assert alone and (tmp_path / "2").read_bytes() == alone and (tmp_path / "3").read_bytes() == alone


def test_thread_sanitizer_sees_a_race() -> None:
    sources = [HERE / "race.cpp", HERE / "threads.cpp", build.build.CSRC / "common" / "parallel.cpp"]
    sources.append(build.build.CSRC / "common" / "pool.cpp")
    program = build.program(thread_variant(), sources, "race")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([program, "race"], env=environment, capture_output=True, text=True)
    assert "WARNING: ThreadSanitizer: data race" in result.stderr and "seeded_race" in result.stderr
    build.run([program, "pool"])
