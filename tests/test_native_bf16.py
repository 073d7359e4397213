"""The page of AVX-512 with bf16 on processors that lack it.

Its two instructions are replaced by plain C++ of what Intel's manual says they do (csrc/common/avx512_bf16.h), and the
kernels go through their cases and the op suite with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastlm import _C
from tests.emulator.build import CSRC, ROOT, python_includes
from tests.native import build
from tests.native.build import ADDRESS, CASES, Variant

pytestmark = [
    pytest.mark.skipif("avx512" not in _C.cpu_isas(), reason="this processor has no AVX-512"),
    pytest.mark.skipif(shutil.which("objcopy") is None, reason="no objcopy"),
]


def emulated() -> Variant:
    folder = build.build.FOLDER.with_name("native")
    folder.mkdir(parents=True, exist_ok=True)
    names = ["VERSION", "GIT_COMMIT", "COMPILER", "CUDA", "CUDA_ARCHS", "CUDA_REASON"]
    config = "".join(f'#define FASTLM_BUILD_{name} ""\n' for name in names)
    if not (folder / "fastlm_build_config.h").is_file():
        (folder / "fastlm_build_config.h").write_text(config)
    flags = build.toolchain.instruction_sets()["avx512"]
    return Variant("bf16-emulated", (*flags, "-DFASTLM_EMULATE_AVX512_BF16", "-I", str(folder), *python_includes()))


def test_cases(tmp_path: Path) -> None:
    """Conversions to the bit, the numbers of baseline x86-64 but for rounding, and no access outside a buffer."""
    baseline = tuple(build.toolchain.instruction_sets()["baseline"])
    plain = build.program(Variant("plain-baseline", baseline), [*CASES, *build.kernels()])
    page = emulated()
    page = replace(page, name=f"{page.name}-sanitized", flags=(*page.flags, *ADDRESS))
    program = build.program(page, [*CASES, *build.kernels()])
    build.run([plain, "small", tmp_path / "plain"])
    build.run([program, "small", tmp_path / "emulated"], ASAN_OPTIONS="detect_leaks=0")
    build.compare(tmp_path / "emulated", tmp_path / "plain")


# In a process of its own, whose fastlm._C is the emulated one.
SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastlm._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fastlm._C"] = module
import _pytest.outcomes, torch
from fastlm.ops import native, products
from fastlm.ops.case import all_cases
from tests.op_suite import check_case
assert native.C is module
torch.set_num_threads(1)
products.library_lags = lambda: True  # products of bf16 are made by pairs, as on Zen 4
products.widens = lambda dtype: dtype == torch.float16
count = 0
for case in all_cases():
    if case.op in ("attention", "decode_attention", "linear", "mlp", "linear_cross_entropy"):
        for dtype in (torch.bfloat16, torch.float32):
            try:
                check_case("cpu", case, dtype)
                count += 1
            except _pytest.outcomes.Skipped:
                pass
            except AssertionError as error:
                raise AssertionError(f"{case} in {dtype}") from error
print(count)
"""


def test_op_suite() -> None:
    sources = [*build.kernels(), *(CSRC / "common" / name for name in build.NO_KERNELS)]
    module = build.program(emulated(), [*sources, CSRC / "bindings.cpp"], "_C.so", ("-shared",))
    environment = {**os.environ, "FASTLM_CPU_ISA": "baseline"}
    command = [sys.executable, "-c", SCRIPT, str(module)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


@pytest.mark.parametrize(
    "name", ["linear/skinny.cpp", "linear/packed.cpp", "attention/forward.cpp", "attention/backward.cpp"]
)
def test_the_instructions_are_used(name: str, tmp_path: Path) -> None:
    toolchain = build.toolchain
    flags = [*toolchain.CXX_FLAGS, *toolchain.instruction_sets()["avx512_bf16"], "-O1", "-I", str(CSRC)]
    flags += ["-DFASTLM_ISA=avx512_bf16", "-DFASTLM_ISA_IS_AVX512_BF16"]
    source = CSRC / name
    assert "avx512_bf16" in toolchain.instruction_sets_of(source)
    subprocess.run([*toolchain.compiler(), *flags, "-c", source, "-o", tmp_path / "kernel.o"], check=True)
    listing = subprocess.run(["objdump", "-d", tmp_path / "kernel.o"], capture_output=True, text=True, check=True)
    assert "vdpbf16ps" in listing.stdout and "vcvtneps2bf16" in listing.stdout
