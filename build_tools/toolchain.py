"""The C++ compiler, its flags, and the instruction sets that the CPU kernels are compiled for."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# -O3: at -O2 GCC 12 keeps the arrays of partial sums in memory, and layer norm in cache takes 1.6 times as long.
# Statements are computed as written: fused multiply-adds are asked for by name (csrc/common/simd.h), so that a result
# does not depend on what the compiler chose to contract. NaN and infinity keep their meaning (no -ffast-math).
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12 reports its own AVX-512 headers
    "-Wno-maybe-uninitialized",
]

# csrc/common/cpu.cpp checks for exactly these features before it picks a set (but prefetchw: where it is missing,
# it does nothing).
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mprfchw"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512cd", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
_X86_64 = {
    "baseline": ["-march=x86-64"],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
}


class BuildError(Exception):
    """What the user must change for the build to work; shown without a traceback."""


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, else the first of c++, g++ and clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX={os.environ['CXX']}: {command[0]} was not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    install = "xcode-select --install" if sys.platform == "darwin" else "apt install g++ (or: dnf install gcc-c++)"
    raise BuildError(f"a C++17 compiler is needed, and c++, g++ and clang++ were not found. Try: {install}")


def compiler_version(command: list[str]) -> str:
    """The first line of `c++ --version`."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run: {error}") from None
    return done.stdout.splitlines()[0].strip()


def instruction_sets() -> dict[str, list[str]]:
    """Name -> compiler flags, plainest first. arm64's baseline has NEON."""
    return _X86_64 if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}


def instruction_sets_of(source: Path) -> list[str]:
    """The sets that a .cpp is compiled for; none: it is compiled once, as it is (csrc/common/isa.h)."""
    text = source.read_text(encoding="utf-8")
    if "FASTLM_DISPATCH_BF16(" in text:
        return list(instruction_sets())
    return [isa for isa in instruction_sets() if isa != "avx512_bf16"] if "FASTLM_DISPATCH(" in text else []


def link_flags() -> list[str]:
    """Exports PyInit__C alone. No OpenMP library: csrc/common/parallel.cpp binds to the one that torch loads."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_PyInit__C"]
    return ["-shared", f"-Wl,--version-script={Path(__file__).resolve().parent / 'exports.txt'}"]


def environment_flags(*names: str) -> list[str]:
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]
