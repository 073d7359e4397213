"""Compiles the CPU kernels into programs: with sanitizers, for other processors, with instructions emulated.

A program has each kernel once, under the name "baseline", with the vectors of the instruction set whose flags it is
compiled with. Unoptimised where nothing is said, which compiles in a fraction of the time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.emulator import build

sys.path.insert(0, str(build.ROOT / "build_tools"))

import toolchain

HERE = Path(__file__).resolve().parent
NO_KERNELS = ["build_info.cpp", "pool.cpp"]
CASES = [HERE / "cases.cpp", HERE / "simd_cases.cpp"]
ADDRESS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Variant:
    """How a program is compiled; `name` is its folder's."""

    name: str
    flags: tuple[str, ...]
    compiler: tuple[str, ...] = ()  # the machine's own where there is none
    objcopy: str = "objcopy"


def kernels() -> list[Path]:
    sources = [source for source in sorted(build.CSRC.glob("*/*.cpp")) if source.parent.name != "emulator"]
    return [source for source in sources if source.name not in NO_KERNELS]


def program(variant: Variant, sources: list[Path], name: str = "program", link: tuple[str, ...] = ()) -> Path:
    """The kernels call the functions of the other instruction sets, which are not there: weak, they are null.

    `link`: flags of the linker alone.
    """
    folder = build.FOLDER.with_name("native") / variant.name
    compiler = [*(variant.compiler or toolchain.compiler())]
    flags = [*toolchain.CXX_FLAGS, "-O0", "-g1", *variant.flags, "-DFASTLM_ISA=baseline", "-DFASTLM_ISA_IS_BASELINE"]
    flags += ["-I", str(build.CSRC), "-I", str(build.ROOT / "tests" / "emulator" / "kernels")]
    compile_one = f"{shlex.join([*compiler, *flags])} -MMD -MF $out.d -c $in -o $out"
    lines = [
        f"rule cxx\n  command = {compile_one} && {variant.objcopy} -w --weaken-symbol='_ZN6fastlm*' $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {shlex.join([*compiler, *variant.flags, *link])} $in -lpthread -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(folder / source.parent.name / f"{source.name}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
    lines.append(f"build {folder / name}: link {' '.join(map(str, objects))}\n")
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    with build.one_at_a_time():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.ninja"
        file.write_text("\n".join(lines))
        command = [*ninja, "-C", str(folder), "-f", file.name, "--quiet"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / name


def run(command: list[str | Path], **environment: str) -> None:
    """Runs a program that must succeed and say nothing."""
    environment = {**os.environ, "FASTLM_CPU_ISA": "baseline", **environment}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert result.stdout + result.stderr == ""


def results(file: Path) -> list[tuple[str, str, NDArray[np.float32]]]:
    """What cases.cpp has recorded: name, type, values."""
    data, found = file.read_bytes(), []
    while data:
        line, _, data = data.partition(b"\n")
        name, kind, count = line.decode().rsplit(" ", 2)
        size = 4 * int(count)
        found.append((name, kind, np.frombuffer(data[:size], np.float32)))
        data = data[size:]
    return found


# As a part of the largest element: what another order of additions and other roundings of 16-bit numbers may make.
TOLERANCE = {"f32": 3e-5, "f16": 4e-3, "bf16": 3e-2}


def compare(got: Path, wanted: Path) -> None:
    ours, theirs = results(got), results(wanted)
    assert [r[:2] for r in ours] == [r[:2] for r in theirs] and ours
    for i, ((name, kind, a), (_, _, b)) in enumerate(zip(ours, theirs, strict=True)):
        error = np.abs(a.astype(np.float64) - b).max(initial=0)
        largest = np.abs(b).max(initial=0)
        assert error <= TOLERANCE[kind] * max(largest, 1e-3), (
            f"result {i}, {name} in {kind}: {error:.3g} of {largest:.3g}"
        )
