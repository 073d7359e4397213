"""The CPU kernels on arm64: cross-compiled with the NEON page, run by qemu, compared with this machine's numbers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native import build
from tests.native.build import CASES, Variant

COMPILER, OBJCOPY, EMULATOR = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objcopy", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, OBJCOPY, EMULATOR, "objcopy") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="here the suite runs the kernels themselves"),
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} (apt install g++-aarch64-linux-gnu qemu-user)"),
]


def test_on_neon_as_on_x86(tmp_path: Path) -> None:
    baseline = tuple(build.toolchain.instruction_sets()["baseline"])
    here = build.program(Variant("plain-baseline", baseline), [*CASES, *build.kernels()])
    there = build.program(Variant("neon", ("-static",), (COMPILER,), OBJCOPY), [*CASES, *build.kernels()])
    build.run([here, "small", tmp_path / "x86"])
    build.run([EMULATOR, there, "small", tmp_path / "arm"])
    build.compare(tmp_path / "arm", tmp_path / "x86")


def test_the_page_is_neons(tmp_path: Path) -> None:
    """The multiply-adds of attention are NEON's, on vectors of four floats."""
    variant = Variant("neon", ("-static",), (COMPILER,), OBJCOPY)
    build.program(variant, [*CASES, *build.kernels()])
    code = build.build.FOLDER.with_name("native") / "neon" / "attention" / "forward.cpp.o"
    listing = subprocess.run([OBJCOPY.replace("objcopy", "objdump"), "-d", code], capture_output=True, text=True)
    assert "fmla" in listing.stdout and ".4s" in listing.stdout
