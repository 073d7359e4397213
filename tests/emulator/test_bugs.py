"""Kernels with a mistake built in: each must be found, by the emulator itself under some schedule or by a sanitizer.

The right kernels (`none`) must pass everywhere. What each mistake is stands beside the kernel, in kernels/bugs_*.cu.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import build, harness

SOURCES = ["bugs_block", "bugs_copies", "bugs_hopper"]
SCHEDULES = [("fifo", 0), ("lifo", 0), *(("random", seed) for seed in range(1, 7))]

# What the error says, at least under one schedule; None: the kernel ends, and what it has written is wrong.
PLAIN: dict[str, str | None] = {
    "block_sum/missing_sync": None,
    "block_sum/divergent_sync": "__syncthreads in divergent code",
    "block_sum/shared_too_short": "a write outside the block's shared memory, at offset 12",
    "block_sum/never_written": None,
    "block_sum/shared_address_lost": "a write outside the block's shared memory, at offset -80",
    "block_sum/own_lane_not_in_mask": "lane 31 is not in its own mask",
    "block_sum/shuffle_in_a_branch": "deadlock",
    "block_sum/exited_lanes_in_mask": "names lanes that have exited",
    "block_sum/different_instructions": "the warp has diverged",
    "warp_exchange/missing_syncwarp": None,
    "last_block_sums/misaligned_atomic": "not aligned to 4 bytes",
    "in_turn/nobody_releases": "threads poll memory that nobody changes",
    "hand_over/missing_arrive": "deadlock",
    "hand_over/wrong_count": "96 threads wanted here, 64 at",
    "hand_over/wrong_barrier": "deadlock",
    "hand_over/missing_sync": None,
    "hand_over/half_a_warp": "deadlock",
    "hand_over/no_such_barrier": "barrier 16; there are 0 to 15",
    "copy/too_many_threads": "a block has 1 to 1024 threads",
    "copy/too_much_shared": "at most 232448 bytes of shared memory",
    "copy/too_much_static": "at most 49152 unless its launch opts in to more",
    "copy/empty_grid": "an empty grid",
    "copy/grid_too_tall": "a grid has at most",
    "double_buffer/missing_wait": None,
    "double_buffer/wait_too_lenient": None,
    "double_buffer/missing_sync": None,
    "double_buffer/missing_sync_before_refill": None,
    "double_buffer/missing_commit": None,
    "double_buffer/misaligned_source": "is not aligned to 16 bytes",
    "double_buffer/misaligned_destination": "is not aligned to 16 bytes",
    "double_buffer/shared_too_small": "outside every allocation",
    "double_buffer/ldmatrix_misaligned": "ldmatrix: the shared address",
    "double_buffer/ldmatrix_outside": "outside every allocation",
    "bulk_ring/wrong_parity": "more arrivals in a phase than its count",
    "bulk_ring/too_many_bytes_expected": "deadlock",
    "bulk_ring/too_few_bytes_expected": "deadlock",
    "bulk_ring/missing_empty_wait": "more arrivals in a phase than its count",
    "bulk_ring/missing_full_wait": "more arrivals in a phase than its count",
    "bulk_ring/missing_fence": "no fence.mbarrier_init",
    "bulk_ring/not_initialised": "an mbarrier that was not initialised",
    "bulk_ring/initialised_twice": "mbarrier.init of a live mbarrier",
    "bulk_ring/too_many_arrivals": "more arrivals in a phase than its count",
    "bulk_ring/released_too_early": None,
    "bulk_ring/ends_under_way": "the block ends before an asynchronous copy",
    "bulk_ring/misaligned_copy": "wanted multiples of 16",
    "store_tiles/missing_proxy_fence": "with no fence.proxy.async",
    "store_tiles/missing_barrier": None,
    "store_tiles/missing_commit": "a bulk store that it never committed",
    "store_tiles/missing_wait": "a bulk store under way",
    "store_tiles/refilled_before_read": None,
    "store_tiles/misaligned_tile": "is not aligned to 1024 bytes",
    "store_tiles/wrong_rank": "3 coordinates for a tensor map of rank 2",
    "store_tiles/tile_outside": "outside every allocation",
    "store_tiles/before_the_tensor": "a TMA store at coordinate -1 of dimension 1: an illegal instruction",
    "tma_gemm/missing_wgmma_fence": "wgmma without a wgmma.fence",
    "tma_gemm/missing_commit": "a wgmma that it never committed",
    "tma_gemm/missing_wait": "a wgmma that it did not wait for",
    "tma_gemm/wait_too_lenient": "a wgmma that it did not wait for",
    "tma_gemm/released_before_wait": None,
    "tma_gemm/wrong_stride": None,
    "tma_gemm/wrong_swizzle": None,
    "tma_gemm/wrong_step": None,
    "tma_gemm/missing_full_wait": "more arrivals in a phase than its count",
    "tma_gemm/missing_empty_wait": "more arrivals in a phase than its count",
    "tma_gemm/wrong_bytes": "deadlock",
    "tma_gemm/missing_store_fence": "with no fence.proxy.async",
    "tma_gemm/missing_store_barrier": None,
    "tma_gemm/a_warp_skips": "the four warps of a warpgroup executed different",
    "tma_gemm/registers_out": "deadlock",
    "tma_gemm/registers_more_by_dec": "setmaxnreg.dec to 232 registers; the warp has only 168",
    "tma_gemm/descriptor_outside": "outside every allocation",
    "tma_gemm/base_offset": "a descriptor with a base offset",
    "swap_in_pairs/missing_first_barrier": "before the first cluster barrier",
    "swap_in_pairs/missing_barrier": None,
    "swap_in_pairs/exits_too_early": "which has exited",
    "swap_in_pairs/no_such_block": "mapa: block 2 of a cluster of 2",
    "swap_in_pairs/wait_without_arrive": "without a barrier.cluster.arrive",
    "swap_in_pairs/arrives_twice": "barrier.cluster.arrive twice",
    "swap_in_pairs/not_whole_clusters": "not made of whole clusters",
    "depends/missing_wait": "no thread executed griddepcontrol.wait",
}

# Right numbers by luck, and found by a sanitizer: "address" names the line, "thread" both lines of the race.
SANITIZED = {
    "block_sum/read_past_the_end": "address",
    "block_sum/write_past_the_end": "address",
    "double_buffer/source_past_the_end": "address",
    "store_tiles/past_the_end": "address",
    "warp_exchange/shuffle_instead_of_syncwarp": "thread",
    "last_block_sums/not_atomic": "thread",
    "last_block_sums/missing_release": "thread",
    "last_block_sums/missing_acquire": "thread",
    "in_turn/missing_release": "thread",
    "in_turn/missing_acquire": "thread",
    "swap_in_pairs/nothing_published": "thread",
    # These the emulator finds as well, some only under some schedules.
    "block_sum/missing_sync": "thread",
    "warp_exchange/missing_syncwarp": "thread",
    "hand_over/missing_sync": "thread",
    "double_buffer/missing_sync_before_refill": "thread",
    "bulk_ring/released_too_early": "thread",
    "swap_in_pairs/missing_barrier": "thread",
}


def small_integers(words: int) -> np.ndarray:
    """Pairs of bfloat16, so that the matrix products are exact."""
    values = np.random.default_rng(words).integers(-4, 5, 2 * words).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)


@pytest.fixture(scope="module")
def kernels() -> harness.Harness:
    try:
        return harness.load(*SOURCES)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def right_result(kernels: harness.Harness, case: str) -> np.ndarray:
    right = case.split("/")[0] + "/none"
    return kernels.run(right, small_integers(kernels.sizes(right)[0]))


def test_every_mistake_is_listed(kernels: harness.Harness) -> None:
    assert {*PLAIN, *SANITIZED} == {case for case in kernels.index if not case.endswith("/none")}


@pytest.mark.parametrize("case", PLAIN)
def test_the_emulator_finds(kernels: harness.Harness, case: str) -> None:
    wanted = right_result(kernels, case)
    errors, wrong = [], False
    for order in SCHEDULES:
        with harness.schedule(*order):
            try:
                got = kernels.run(case, small_integers(kernels.sizes(case)[0]))
                wrong = wrong or not np.array_equal(got, wanted)
            except harness.KernelError as error:
                errors.append(str(error))
    message = PLAIN[case]
    if message is None:
        assert wrong, f"right numbers under every schedule; {errors}"
    else:
        assert any(message in e for e in errors), errors or "no error"


@pytest.mark.parametrize("order", SCHEDULES, ids=lambda o: f"{o[0]}-{o[1]}")
def test_right_kernels_pass(kernels: harness.Harness, order: tuple[str, int]) -> None:
    for case in kernels.index:
        if case.endswith("/none"):
            wanted = right_result(kernels, case)
            with harness.schedule(*order):
                got = kernels.run(case, small_integers(kernels.sizes(case)[0]))
            assert np.array_equal(got, wanted), case


def test_the_gemm_is_right(kernels: harness.Harness) -> None:
    k = 320
    words = small_integers(192 * k // 2)
    matrix = (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(192, k)
    got = (kernels.run("tma_gemm/none", words).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    wanted = matrix[:128] @ matrix[128:].T
    assert np.abs(got.reshape(128, 64) - wanted).max() <= np.abs(wanted).max() / 256


def test_an_error_names_kernel_line_thread_and_seed(kernels: harness.Harness) -> None:
    with harness.schedule("random", 5), pytest.raises(harness.KernelError) as error:
        kernels.run("block_sum/own_lane_not_in_mask", small_integers(128))
    text = str(error.value)
    assert text.startswith("block_sum: ")
    assert "bugs_block.cu:" in text
    assert "thread (" in text and "of block (0, 0, 0)" in text
    assert "schedule random, seed 5" in text


def test_the_same_seed_gives_the_same_error(kernels: harness.Harness) -> None:
    messages = []
    for _ in range(2):
        with harness.schedule("random", 3), pytest.raises(harness.KernelError) as error:
            kernels.run("bulk_ring/wrong_parity", small_integers(kernels.sizes("bulk_ring/none")[0]))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_an_unknown_schedule_is_refused(kernels: harness.Harness) -> None:
    with harness.schedule("lucky"), pytest.raises(harness.KernelError, match="wanted fifo, lifo or random"):
        kernels.run("copy/none", small_integers(32))


# ---- sanitizers


def compile_program(name: str, flavour: str, *sources: Path) -> Path:
    try:
        ninja = build.Ninja(f"{name}-{flavour}")
        program = ninja.program(name, flavour, [ninja.object(source, flavour) for source in sources])
        ninja.run()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    return program


def run_program(program: Path, *arguments: str, schedule: str = "fifo") -> subprocess.CompletedProcess:
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=0", "FASTLM_EMULATOR_SEED": "1"}
    environment = {**os.environ, **options, "FASTLM_EMULATOR_SCHEDULE": schedule}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def address() -> Path:
    sources = [harness.KERNELS / f"{s}.cu" for s in SOURCES]
    return compile_program("bugs", "address", harness.KERNELS / "harness_program.cpp", *sources)


@pytest.fixture(scope="module")
def thread() -> Path:
    sources = [harness.KERNELS / f"{s}.cu" for s in SOURCES]
    return compile_program("bugs", "thread", harness.KERNELS / "harness_program.cpp", *sources)


REPORT = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}


@pytest.mark.parametrize("case", SANITIZED)
def test_a_sanitizer_finds(case: str, request: pytest.FixtureRequest) -> None:
    program = request.getfixturevalue(SANITIZED[case])
    text = ""
    for schedule in ("random", "fifo"):  # where blocks run one after the other, fewer races are seen
        result = run_program(program, case, schedule=schedule)
        text += result.stdout + result.stderr
        by_the_emulator = (
            SANITIZED[case] == "address" and "out of bounds" in result.stdout
        )  # a copy that it made itself
        if REPORT[SANITIZED[case]] in result.stderr or by_the_emulator:
            break
    else:
        pytest.fail(text or "no report")
    assert "bugs_" in text


@pytest.mark.parametrize("schedule", ["fifo", "random"])
@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_right_kernels_are_clean(
    kernels: harness.Harness, flavour: str, schedule: str, request: pytest.FixtureRequest
) -> None:
    program = request.getfixturevalue(flavour)
    right = [case for case in kernels.index if case.endswith("/none")]
    result = run_program(program, *right, schedule=schedule)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert result.stderr == ""


# Programs of small cases (kernels/sanitize_<name>.cpp), and the files of csrc whose kernels they run.
OPS = {
    "layer_norm": ["layer_norm/*.cu"],
    "attention": ["attention/*.cu"],
    "decode_attention": ["decode_attention/*.cu"],
    "gemm": ["gemm/*.cu", "cross_entropy/*.cu", "linear/*.cu"],
    "tokens": ["rotary/*.cu", "embedding/*.cu", "sampling/*.cu"],
    "optimizer": ["optimizer/*.cu"],
    "row_linear": ["gpt/*.cu"],
}


def test_every_kernel_is_in_a_program_for_the_sanitizers() -> None:
    listed = {source for files in OPS.values() for pattern in files for source in build.CSRC.glob(pattern)}
    assert listed == set(build.CSRC.rglob("*.cu"))


@pytest.mark.parametrize("schedule", ["fifo", "random"])
@pytest.mark.parametrize("flavour", ["address", "thread"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_is_clean(name: str, flavour: str, schedule: str) -> None:
    sources = [source for files in OPS[name] for source in sorted(build.CSRC.glob(files))]
    program = compile_program(name, flavour, harness.KERNELS / f"sanitize_{name}.cpp", *sources)
    result = run_program(program, *(["wide"] if flavour == "address" else []), schedule=schedule)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert result.stderr == ""
