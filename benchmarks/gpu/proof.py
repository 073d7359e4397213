"""The parts that show that the kernels are right: conformance, the op suite, compute-sanitizer, determinism."""

from __future__ import annotations

import functools
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fastlm
from benchmarks.gpu.record import LeftOut, Record, Table, write
from fastlm import ops
from fastlm.bench.ops import modes_of, numbers, op_name
from fastlm.bench.peers import Peer
from fastlm.bench.timing import reason_of
from fastlm.ops import registry
from fastlm.ops.case import Case, Maker, all_cases

if TYPE_CHECKING:
    from tests.emulator.conformance import Example
    from tests.emulator.harness import Harness

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [f"conformance_{topic}" for topic in ("warp", "sm80", "tma", "wgmma", "cluster")]
BACKENDS = ("cuda", "triton")


def gpu() -> None:
    """Raises LeftOut without a GPU."""
    if not torch.cuda.is_available():
        raise LeftOut("torch sees no CUDA GPU")


def conformance(record: Record) -> None:
    """Every PTX wrapper: on the GPU, where it is one of compute capability 9.0 and nvcc is there, else on the emulator.
    What the GPU writes is kept, and the emulator's tests are held to it (tests/emulator/gpu_outputs.py)."""
    from tests.emulator import build, conformance, gpu_outputs, harness

    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if torch.cuda.is_available() and not on_gpu:
        record.note("the conformance kernels are for compute capability 9.0: they ran on the emulator instead")
    try:
        kernels = harness.load_for_gpu(*SOURCES) if on_gpu else harness.load(*SOURCES)
    except build.Unavailable as reason:
        raise LeftOut(str(reason)) from None
    wrong, right, written = record.table("Wrong", ("kernel", "how")), 0, {}
    examples = conformance.all_examples(list(kernels.index))
    outputs = _outputs_of_gpu(len(examples)) if on_gpu else (_output_of(kernels, e) for e in examples)
    for example, got in zip(examples, outputs, strict=True):
        if isinstance(got, str):
            wrong.add(str(example), got)
            continue
        written[str(example)] = gpu_outputs.of(example, got)
        mistake = conformance.mistake(example, got)
        right += mistake is None
        if mistake is not None:
            wrong.add(str(example), mistake)
    where = "the GPU" if on_gpu else "the emulator"
    record.note(f"{right} of {right + len(wrong.rows)} examples of {len(kernels.index)} kernels are right on {where}")
    if on_gpu:
        write(
            gpu_outputs.PATH, json.dumps({"device": torch.cuda.get_device_name(), "outputs": written}, indent=1) + "\n"
        )
        record.note(f"its outputs are in {gpu_outputs.PATH.relative_to(ROOT)}")
    if wrong.rows:
        raise RuntimeError(f"{len(wrong.rows)} examples are wrong")


def _output_of(kernels: Harness, example: Example) -> np.ndarray | str:
    """What the kernel wrote, or the error that it ended with."""
    from tests.emulator.harness import KernelError

    try:
        return kernels.run(example.case, example.read, example.before)
    except KernelError as error:
        return reason_of(error)


def _outputs_of_gpu(count: int) -> Iterator[np.ndarray | str]:
    """Those of all examples. A process that has had an error on the GPU is of no more use: the next one goes on."""
    pool: ProcessPoolExecutor | None = None
    try:
        for number in range(count):
            if pool is None:
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                output = pool.submit(_output_of_gpu, number).result(timeout=60)
            except Exception as error:
                output = f"its process failed: {reason_of(error)}"
            if isinstance(output, str):
                pool.shutdown(wait=False, cancel_futures=True)
                pool = None
            yield output
    finally:
        if pool is not None:
            pool.shutdown()


def _output_of_gpu(number: int) -> np.ndarray | str:
    """In a process of its own: the example's by its number."""
    kernels, examples = _gpu_examples()
    return _output_of(kernels, examples[number])


@functools.cache
def _gpu_examples() -> tuple[Harness, list[Example]]:
    from tests.emulator import conformance, harness

    kernels = harness.load_for_gpu(*SOURCES)
    return kernels, conformance.all_examples(list(kernels.index))


def op_suite(record: Record) -> None:
    """tests/test_ops.py on the backends cuda and triton."""
    gpu()
    table = record.table("Tests", ("backend", "passed", "skipped", "failed"))
    failed = 0
    for backend in BACKENDS:
        reason = registry.unavailable(backend)
        if reason is not None:
            record.note(f"{backend}: {reason}")
            continue
        choose = f"test_against_float64 and {backend}"
        failed += run_tests(record, table, backend, ["tests/test_ops.py", "-k", choose, "--maxfail=20"])
    if failed:
        raise RuntimeError(f"{failed} tests fail")


def run_tests(record: Record, table: Table, name: str, arguments: Sequence[str]) -> int:
    """pytest, with a row of counts that grows while it runs. Returns how many tests failed; a run that ends before any
    test is one failure too."""
    counts = {"PASSED": 0, "SKIPPED": 0, "FAILED": 0, "ERROR": 0}
    table.add(name, 0, 0, 0)
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "--tb=short", *_in_parallel(), *arguments]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            found = re.search(r"::\S.* (PASSED|SKIPPED|FAILED|ERROR)\b|^\[gw.*\] (PASSED|SKIPPED|FAILED|ERROR) ", line)
            if found is None:
                continue
            outcome = found[1] or found[2]
            counts[outcome] += 1
            if outcome in ("FAILED", "ERROR"):
                record.note(line.strip())
            table.rows[-1] = [name, counts["PASSED"], counts["SKIPPED"], counts["FAILED"] + counts["ERROR"]]
            record.save()
    failed = counts["FAILED"] + counts["ERROR"]
    if process.returncode != 0 and not failed:
        record.note(f"{name}: pytest ended with {process.returncode}: {last}")
        return 1
    return failed


def _in_parallel() -> list[str]:
    """pytest's arguments for several processes, where there are cores for them: Triton compiles on one at a time."""
    cores = min(os.cpu_count() or 1, 12)
    return ["-n", str(cores)] if cores > 2 and importlib.util.find_spec("xdist") is not None else []


def reason_of_text(text: str) -> str:
    """The last line, short enough for a table."""
    lines = text.strip().splitlines()
    return lines[-1][:160] if lines else "it said nothing"


def sanitizer(record: Record) -> None:
    """Every op's first small case under compute-sanitizer's tools."""
    gpu()
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise LeftOut("compute-sanitizer is not installed")
    table, failed = record.table("Reports", ("tool", "result")), False
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has its own bounds
    names = ("memcheck", "racecheck", "synccheck", "initcheck")

    def run(name: str) -> subprocess.CompletedProcess[str]:
        # initcheck must see every kernel: what torch's have written would count as never written.
        ours_alone = [] if name == "initcheck" else ["--kernel-regex", "kns=fastlm"]
        command = [tool, "--tool", name, *ours_alone, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.gpu", "--small-cases"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    with ThreadPoolExecutor(len(names)) as pool:
        results = dict(zip(names, pool.map(run, names), strict=True))
    for name, done in results.items():
        summary = re.findall(r"=+ (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", done.stdout)
        table.add(name, summary[-1] if summary else reason_of_text(done.stderr or done.stdout))
        failed = failed or done.returncode != 0
    if failed:
        raise RuntimeError("compute-sanitizer has found something, or did not run")


def first_cases() -> list[Case]:
    """One small case of each op."""
    return list({case.op: case for case in reversed(all_cases())}.values())[::-1]


def small_cases(backend: str = "cuda", device: str = "cuda") -> int:
    """Runs each op's first case that the backend has, forward and backward. Returns how many."""
    ran = 0
    for case in first_cases():
        arguments = case.build(Maker(torch.float32, device))
        with fastlm.backend(backend):
            try:
                numbers(Peer(backend, getattr(ops, case.op)), arguments, modes_of(case)[-1])
                ran += 1
            except fastlm.UnsupportedError:
                continue
    return ran


def determinism(
    record: Record, device: str = "cuda", backends: Sequence[str] = BACKENDS, cases: Sequence[Case] | None = None
) -> None:
    """Every op's benchmark cases (or these), twice: equal to the bit."""
    if device == "cuda":
        gpu()
    table, different = record.table("Twice", ("op and case", "backend", "equal")), 0
    for case in all_cases(bench=True) if cases is None else cases:
        for backend in backends:
            try:
                with fastlm.backend(backend):
                    first, second = (_bits(case, backend, device) for _ in range(2))
            except fastlm.UnsupportedError:
                continue
            except Exception as error:
                table.add(f"{op_name(case)} {case.name}", backend, reason_of(error))
                different += 1
                continue
            equal = all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
            different += not equal
            table.add(f"{op_name(case)} {case.name}", backend, "yes" if equal else "NO")
    if different:
        raise RuntimeError(f"{different} cases differ between two runs, or failed")


def _bits(case: Case, backend: str, device: str) -> list[Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = numbers(Peer(backend, getattr(ops, case.op)), case.build(Maker(dtype, device)), modes_of(case)[-1])
    return [t.detach().cpu().reshape(-1).view(torch.uint8).numpy() for t in made if t is not None]
