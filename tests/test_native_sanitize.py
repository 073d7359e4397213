"""The C++ kernels for CPUs, compiled with AddressSanitizer and UBSan into a program of small odd cases: no report.

Unoptimised, which compiles in a fraction of the time. Each program has the kernels once, under the name "baseline",
with the vectors of the instruction set whose flags they are compiled with.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm import _C
from tests.emulator import build

sys.path.insert(0, str(build.ROOT / "build_tools"))

import toolchain

PROGRAM = Path(__file__).resolve().parent / "native" / "sanitize_cpu.cpp"
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
NO_KERNELS = ["build_info.cpp", "pool.cpp"]


def compile_program(isa: str) -> Path:
    """The kernels call the functions of the other instruction sets, which are not there: weak, they are null."""
    compiler, folder = toolchain.compiler(), build.FOLDER.with_name("native_sanitized") / isa
    flags = [*toolchain.CXX_FLAGS, *toolchain.instruction_sets()[isa], "-O0", "-g1", *SANITIZERS]
    flags += ["-DFASTLM_ISA=baseline", "-DFASTLM_ISA_IS_BASELINE"]
    flags += ["-I", str(build.CSRC), "-I", str(build.ROOT / "tests" / "emulator" / "kernels")]
    sources = [source for source in sorted(build.CSRC.glob("*/*.cpp")) if source.parent.name != "emulator"]
    objects = []
    compile_one = f"{shlex.join([*compiler, *flags])} -MMD -MF $out.d -c $in -o $out"
    lines = [
        f"rule cxx\n  command = {compile_one} && objcopy --weaken $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {shlex.join([*compiler, *SANITIZERS])} $in -o $out",
    ]
    for source in [PROGRAM, *(s for s in sources if s.name not in NO_KERNELS)]:
        objects.append(folder / source.parent.name / f"{source.name}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
    lines.append(f"build {folder / 'program'}: link {' '.join(map(str, objects))}\n")
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    with build.one_at_a_time():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines))
        result = subprocess.run([*ninja, "-C", str(folder), "--quiet"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "program"


@pytest.mark.skipif(shutil.which("objcopy") is None, reason="no objcopy")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_cpu_kernels_are_clean(isa: str) -> None:
    if isa not in _C.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, "FASTLM_CPU_ISA": "baseline", "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([compile_program(isa)], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert result.stdout + result.stderr == ""
