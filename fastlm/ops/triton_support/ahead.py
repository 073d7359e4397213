"""Compiling every kernel in every configuration that it can choose, for any architecture, without a GPU.

The examples of the ops are called with meta tensors: nothing is computed, and each launch is recorded with the very
arguments that it would have. Triton's own binder turns them into a signature, and its compiler into a binary, whose
registers, shared memory and spills are read from the file.

What is compiled: a kernel's first choice of configuration with every kind of arguments, and each further candidate,
which only `fastlm tune` can choose (by measuring it), once, with the arguments of the first example that offers it.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from fastlm.ops import registry
from fastlm.ops.triton_support import availability, sources
from fastlm.ops.triton_support.config import Config
from fastlm.ops.triton_support.kernel import Example, Kernel, Recorder
from fastlm.ops.triton_support.target import SHARED_BYTES, pretend


@dataclass(frozen=True)
class Launch:
    """One launch of an example: a kernel, a configuration and the arguments."""

    example: str
    kernel: Kernel
    config: Config
    arguments: tuple

    @functools.cached_property
    def key(self) -> str:
        """Of what can make other code, in a few letters: the arguments' dtypes, alignment, divisibility, constants."""
        return sources.digest(repr(self.kernel._key(0, self.config, self.arguments)[2:]))

    @property
    def identity(self) -> tuple[str, str, str]:
        """Unique within an architecture, and the same in every process."""
        return self.kernel.label, repr(self.config), self.key

    @property
    def source(self) -> str:
        """A digest of the kernel's code."""
        return sources.of_module(self.kernel.name.partition(":")[0])


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    `key` and `source`: those of the launch. `spilled`: bytes (NVIDIA) or registers (AMD) that did not fit.
    `instructions`: those of `INSTRUCTIONS` that it uses. `descriptors`: whether it was launched with host-made tensor
    descriptors.
    """

    arch: str
    example: str
    kernel: str
    config: str
    key: str
    source: str
    registers: int
    shared: int
    spilled: int
    instructions: tuple[str, ...]
    descriptors: bool

    def problem(self) -> str | None:
        """None, or why this configuration must not be among the candidates."""
        if self.spilled:
            return f"spills {self.spilled} {'registers' if self.arch.startswith('gfx') else 'bytes'}"
        if self.shared > SHARED_BYTES[self.arch]:
            return f"needs {self.shared} bytes of shared memory, {self.arch} has {SHARED_BYTES[self.arch]}"
        return None


# Matrix products and asynchronous copies, by which one sees what a kernel was compiled to.
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "cp.async.bulk.tensor", "cp.async.cg", "v_mfma")


class _Listing(Recorder):
    """Writes the launches down in place of making them; `forced`: one kernel, and the index of its candidate."""

    def __init__(self, forced: tuple[Kernel, int] | None) -> None:
        self.forced = forced
        self.choices: dict[Kernel, int] = {}  # the most candidates that a kernel had
        self.launches: list[tuple[Kernel, Config, tuple]] = []

    def choose(self, kernel: Kernel, problem: Any, candidates: Sequence[Config]) -> Config:
        self.choices[kernel] = max(len(candidates), self.choices.get(kernel, 0))
        index = self.forced[1] if self.forced is not None and self.forced[0] is kernel else 0
        return candidates[min(index, len(candidates) - 1)]

    def launch(self, kernel: Kernel, config: Config, grid: tuple[int, int, int], arguments: tuple) -> bool:
        self.launches.append((kernel, config, arguments))
        return True


def _record(example: Example, forced: tuple[Kernel, int] | None) -> _Listing:
    listing = _Listing(forced)
    Kernel.recorder = listing
    try:
        example.call()
    finally:
        Kernel.recorder = None
    return listing


def modules() -> dict[str, Any]:
    """op -> its triton.py; ops that share one are listed once."""
    found: dict[str, Any] = {}
    for op, backends in registry.implementations().items():
        module = backends.get("triton")
        if module is not None and module not in found.values():
            found[op] = module
    return found


def launches(arch: str, ops: Sequence[str] = ()) -> Iterator[Launch]:
    """What is compiled of these ops (all) for an architecture; each once."""
    seen: set[tuple[str, str, str]] = set()
    tried: set[tuple[str, str]] = set()
    with pretend(arch):
        for op, module in modules().items():
            if ops and op not in ops:
                continue
            for example in module.examples(torch.device("meta")):
                first = _record(example, None)
                for kernel, config, arguments in first.launches:
                    launch = Launch(f"{op} {example.name}", kernel, config, arguments)
                    tried.add(launch.identity[:2])
                    if launch.identity not in seen:
                        seen.add(launch.identity)
                        yield launch
                for kernel, i in [(kernel, i) for kernel, count in first.choices.items() for i in range(1, count)]:
                    for other, config, arguments in _record(example, (kernel, i)).launches:
                        launch = Launch(f"{op} {example.name}", other, config, arguments)
                        if other is kernel and launch.identity[:2] not in tried:
                            tried.add(launch.identity[:2])
                            seen.add(launch.identity)
                            yield launch


def binary(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel of one launch, for an architecture. Raises what Triton raises where it cannot be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if availability.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, and then Triton cannot compile: unset it")
    function, config = launch.kernel.function, launch.config
    launch.kernel.check(config, launch.arguments)
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    binder = create_function_from_signature(function.signature, function.params, backend)
    given = {**config.constants, **config.options(), "debug": False}
    bound, specialization, options = binder(*launch.arguments, **given)
    options, signature, constants, attributes = function._pack_args(backend, given, bound, specialization, options)
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one launch for an architecture, and read what it takes."""
    amd = arch.startswith("gfx")
    compiled = binary(launch, arch)
    text = compiled.asm["amdgcn" if amd else "ptx"]
    registers, static, spilled = _amd_usage(text) if amd else _nvidia_usage(compiled.asm["cubin"], text)
    return Compiled(
        arch,
        launch.example,
        launch.kernel.label,
        repr(launch.config),
        launch.key,
        launch.source,
        registers,
        max(compiled.metadata.shared, static),
        spilled,
        tuple(name for name in INSTRUCTIONS if name in text),
        any(hasattr(a, "block_shape") for a in launch.arguments),
    )


def compile_all(launches: Sequence[Launch], arch: str, jobs: int = 1) -> Iterator[Compiled]:
    """Compile them, in `jobs` processes; they come in the order in which they are done. An error names its launch."""
    if jobs <= 1:
        yield from map(_compile, ((arch, launch) for launch in launches))
        return
    # The launches hold functions, which do not travel: each process lists them itself.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_compile_one, arch, launch.identity) for launch in launches]):
            yield future.result()


def _compile(task: tuple[str, Launch]) -> Compiled:
    arch, launch = task
    try:
        return compile_launch(launch, arch)
    except Exception as error:
        raise RuntimeError(f"{arch} {launch.kernel.label} ({launch.config}), {launch.example}: {error}") from error


@functools.cache
def _listed(arch: str) -> dict[tuple[str, str, str], Launch]:
    return {launch.identity: launch for launch in launches(arch)}


def _compile_one(arch: str, identity: tuple[str, str, str]) -> Compiled:
    return _compile((arch, _listed(arch)[identity]))


def _nvidia_usage(cubin: bytes, ptx: str) -> tuple[int, int, int]:
    """(registers, static shared memory, bytes of spills) of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|SHARED|STACK):(\d+)", text))
    # Without a stack nothing was spilled. With one, only the assembler says how much of it holds spilled registers.
    spilled = _ptxas_spills(ptx) if int(usage["STACK"]) else 0
    return int(usage["REG"]), int(usage["SHARED"]), spilled


def _ptxas_spills(ptx: str) -> int:
    """Bytes that are stored for want of registers, and loaded again: the larger number."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target sm_(\d+)(\w*)", ptx, re.MULTILINE)
    assert target is not None, "no .target in the PTX"
    architecture = f"--gpu-name=sm_{target[1]}{target[2]}"
    ptxas = get_ptxas(int(target[1])).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        # as Triton calls it
        command = [ptxas, "-lineinfo", "-v", "--regAllocOptLevel=2", architecture, file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text)))


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    """(vector registers, LDS, spilled vector registers) of a kernel."""

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        assert found is not None, f"no .{name} in the assembly"
        return int(found[1])

    return number("vgpr_count"), number("group_segment_fixed_size"), number("vgpr_spill_count")
