"""The build itself: what is compiled how, what is found where, and what a failed build says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "build_tools").is_dir():
    pytest.skip("not in a source tree: there is no build_tools/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "build_tools"))

import checked_nvcc  # noqa: E402
import cuda_toolkit  # noqa: E402
import ninja_file  # noqa: E402
import toolchain  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="no C++ compiler on this machine"
)


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """An environment without nvcc, without a driver, and without FASTLM_CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FASTLM_CUDA", "FASTLM_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: None)
    return tmp_path


def fake_nvcc(folder: Path) -> Path:
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return nvcc


class TestWhereCudaIsFound:
    def test_auto_without_nvcc_says_so(self, no_nvcc):
        assert cuda_toolkit.find_toolkit() == (None, "no nvcc was found")
        assert cuda_toolkit.required_wheels() == []

    def test_one_without_nvcc_asks_for_the_wheels(self, no_nvcc, monkeypatch):
        monkeypatch.setenv("FASTLM_CUDA", "1")
        assert cuda_toolkit.required_wheels() == cuda_toolkit.COMPILER_WHEELS
        with pytest.raises(toolchain.BuildError, match="pip install 'nvidia-cuda-nvcc"):
            cuda_toolkit.find_toolkit()

    def test_auto_with_a_driver_asks_for_the_wheels(self, no_nvcc, monkeypatch):
        for version in (0, 13000, 13020):
            monkeypatch.setattr(cuda_toolkit, "driver_version", lambda version=version: version)
            assert cuda_toolkit.required_wheels() == cuda_toolkit.COMPILER_WHEELS

    def test_auto_with_an_old_driver_explains(self, no_nvcc, monkeypatch):
        monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: 12040)
        assert cuda_toolkit.required_wheels() == []
        toolkit, reason = cuda_toolkit.find_toolkit()
        assert toolkit is None and "CUDA 12.4" in reason and "CUDA_HOME" in reason

    def test_zero_asks_for_nothing(self, no_nvcc, monkeypatch):
        monkeypatch.setenv("FASTLM_CUDA", "0")
        monkeypatch.setattr(cuda_toolkit, "driver_version", lambda: 13000)
        fake_nvcc(no_nvcc / "bin")
        monkeypatch.setenv("CUDA_HOME", str(no_nvcc))
        assert cuda_toolkit.required_wheels() == []
        assert cuda_toolkit.find_toolkit() == (None, "FASTLM_CUDA=0")

    def test_order(self, no_nvcc, monkeypatch):
        wheel = fake_nvcc(no_nvcc / "nvidia" / "cu13" / "bin")
        assert cuda_toolkit.find_nvcc() == wheel
        on_path = fake_nvcc(no_nvcc / "on_path")
        monkeypatch.setenv("PATH", str(on_path.parent))
        assert cuda_toolkit.find_nvcc() == on_path
        home = fake_nvcc(no_nvcc / "home" / "bin")
        monkeypatch.setenv("CUDA_HOME", str(no_nvcc / "home"))
        assert cuda_toolkit.find_nvcc() == home
        assert cuda_toolkit.required_wheels() == []

    def test_broken_nvcc(self, no_nvcc, monkeypatch):
        fake_nvcc(no_nvcc / "bin")
        monkeypatch.setenv("CUDA_HOME", str(no_nvcc))
        assert "not an nvcc" in cuda_toolkit.find_toolkit()[1]
        monkeypatch.setenv("FASTLM_CUDA", "1")
        with pytest.raises(toolchain.BuildError, match="not an nvcc"):
            cuda_toolkit.find_toolkit()

    def test_bad_settings(self, no_nvcc, monkeypatch):
        monkeypatch.setenv("FASTLM_CUDA", "yes")
        with pytest.raises(toolchain.BuildError, match="'yes'; wanted auto, 1 or 0"):
            cuda_toolkit.setting()
        monkeypatch.setenv("FASTLM_CUDA_ARCHS", "80;hopper")
        with pytest.raises(toolchain.BuildError, match="'hopper' is no architecture"):
            cuda_toolkit.archs()

    def test_architectures(self, no_nvcc, monkeypatch):
        assert cuda_toolkit.gencode(cuda_toolkit.archs()) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_90,code=compute_90",
        ]
        monkeypatch.setenv("FASTLM_CUDA_ARCHS", "80;120+PTX")
        assert cuda_toolkit.archs() == ["80", "120+PTX"]


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4calmPf' for 'sm_80'
ptxas info    : Function properties for _Z4calmPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    64 bytes stack frame, 60 bytes spill stores, 56 bytes spill loads
"""


class TestSlowKernelsFailTheBuild:
    def test_spills(self):
        assert checked_nvcc.problems(PTXAS, []) == [
            "_Z5spillPf (sm_90a) spills registers: 60 bytes spill stores, 56 bytes spill loads"
        ]
        assert checked_nvcc.problems(PTXAS, ["spill"]) == []

    @pytest.mark.parametrize("code", ["C7510", "C7511", "C7514", "C7515"])
    def test_serialised_wgmma(self, code):
        line = f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
        assert checked_nvcc.problems(line, ["wgmma"]) == [line]

    def test_allowing_needs_a_reason(self):
        assert checked_nvcc.ALLOWED.findall("// fastlm: allow-spills backward: 8 bytes, measured\n") == ["backward"]
        assert checked_nvcc.ALLOWED.findall("// fastlm: allow-spills backward:\n") == []

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
    def test_a_real_kernel(self, tmp_path):
        source, target = tmp_path / "kernel.cu", tmp_path / "kernel.o"
        kernel = """
            __global__ void __maxnreg__(24) hungry(float* p) {
              float a[96];
              for (int i = 0; i < 96; ++i) a[i] = p[i * 32 + threadIdx.x];
              __syncthreads();
              for (int i = 0; i < 96; ++i) p[i * 32 + threadIdx.x] = a[i] * a[95 - i];
            }"""
        command = [sys.executable, str(ROOT / "build_tools" / "checked_nvcc.py"), "nvcc", "-arch=sm_80"]
        command += ["-Xptxas", "-v", "-c", str(source), "-o", str(target)]
        source.write_text(kernel)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "hungry" in done.stdout and "spills registers" in done.stdout
        assert not target.exists()
        source.write_text("// fastlm: allow-spills hungry: it is made to\n" + kernel)
        assert subprocess.run(command).returncode == 0
        assert target.exists()


SOURCES = {
    "common/shared.h": "#pragma once\ninline int shared() { return 1; }\n",
    "plain.cpp": '#include "common/shared.h"\nint plain() { return shared(); }\n',
    "other.cpp": "int other() { return 2; }\n",
    "kernel.cpp": "#define FASTLM_DISPATCH(x)\nFASTLM_DISPATCH(x)\nnamespace FASTLM_ISA { int f() { return 3; } }\n",
    "emulator/never.cpp": "#error the emulator is no part of the module\n",
    "bindings.cpp": "int stands_for_the_bindings() { return 0; }\n",
}


@needs_compiler
class TestIncrementalBuild:
    @pytest.fixture
    def tree(self, tmp_path):
        pytest.importorskip("pybind11")
        pytest.importorskip("ninja")
        for name, text in SOURCES.items():
            path = tmp_path / "csrc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    @staticmethod
    def build(tree: Path) -> set[str]:
        """Builds; the objects that were compiled by it."""
        folder = tree / "build"
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.o")}
        ninja_file.NinjaFile(tree, folder, None).write()
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "--quiet"], check=True)
        return {
            str(p.relative_to(folder / "obj")) for p in folder.rglob("*.o") if before.get(p) != p.stat().st_mtime_ns
        }

    def test_only_what_changed(self, tree):
        per_isa = {f"kernel.cpp.{isa}.o" for isa in toolchain.instruction_sets_of(tree / "csrc" / "kernel.cpp")}
        assert "kernel.cpp.baseline.o" in per_isa
        assert self.build(tree) == {"plain.cpp.o", "other.cpp.o", "bindings.cpp.o"} | per_isa
        assert self.build(tree) == set()
        (tree / "csrc" / "other.cpp").write_text("int other() { return 4; }\n")
        assert self.build(tree) == {"other.cpp.o"}
        (tree / "csrc" / "common" / "shared.h").write_text("#pragma once\ninline int shared() { return 5; }\n")
        assert self.build(tree) == {"plain.cpp.o"}
        (tree / "csrc" / "new.cpp").write_text("int added() { return 6; }\n")
        assert self.build(tree) == {"new.cpp.o"}


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(toolchain.BuildError, match=r"a C\+\+17 compiler is needed"):
        toolchain.compiler()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(toolchain.BuildError, match="no-such-compiler was not found"):
        toolchain.compiler()


def test_bf16_kernels_have_a_set_of_their_own(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text("FASTLM_DISPATCH_BF16(kernel, (), ())\n")
    assert toolchain.instruction_sets_of(source) == list(toolchain.instruction_sets())
    source.write_text("FASTLM_DISPATCH(kernel, (), ())\n")
    assert "avx512_bf16" not in toolchain.instruction_sets_of(source)


def test_the_sdist_has_every_source(tmp_path):
    """What an sdist lacks is noticed by whoever installs from it, and by nobody else."""
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("csrc", "build_tools", "fastlm"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "FASTLM_CUDA": "0"}, capture_output=True)
    (archive,) = tmp_path.glob("fastlm-*.tar")
    with tarfile.open(archive) as tar:
        packed = {"/".join(name.split("/")[1:]) for name in tar.getnames()}
    wanted = {
        str(p.relative_to(tree))
        for f in ("csrc", "build_tools", "fastlm")
        for p in (tree / f).rglob("*")
        if p.is_file()
    }
    assert wanted - packed == set()
    assert {"pyproject.toml", "setup.py", "fastlm/py.typed", "csrc/common/simd.h"} <= packed
