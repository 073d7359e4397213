"""Writes the ninja file that compiles csrc/ and links the module."""

from __future__ import annotations

import shlex
import sys
import sysconfig
from pathlib import Path

import cuda_toolkit
import toolchain

HERE = Path(__file__).resolve().parent


def _quote(words: list[str]) -> str:
    """A shell command, with ninja's own `$` escaped."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """One build folder: objects, the module, and build.ninja."""

    def __init__(self, root: Path, folder: Path, toolkit: cuda_toolkit.Toolkit | None):
        self.csrc, self.folder, self.toolkit = root / "csrc", folder, toolkit
        self.module = folder / "_C.so"
        self.lines: list[str] = []
        self.objects: list[Path] = []

    def write(self) -> Path:
        self._rules()
        self._cpp_objects()
        if self.toolkit:
            self._cuda_objects(self.toolkit)
        libraries = []
        if self.toolkit:
            libraries = [str(self.toolkit.static_runtime), "-lrt", "-lpthread", "-ldl"]
        self._edge(self.module, "link", self.objects, {"libraries": _quote(libraries)})
        path = self.folder / "build.ninja"
        _write_if_changed(path, "\n".join(self.lines) + "\n")
        return path

    def _rules(self) -> None:
        cxx = toolchain.compiler()
        flags = [*toolchain.CXX_FLAGS, "-I", str(self.csrc), *toolchain.environment_flags("CPPFLAGS", "CXXFLAGS")]
        self._rule("cxx", f"{_quote([*cxx, *flags])} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)
        link = [*cxx, *toolchain.link_flags(), *toolchain.environment_flags("LDFLAGS")]
        self._rule("link", f"{_quote(link)} $in $libraries -o $out")
        if self.toolkit:
            wrapper = [sys.executable, str(HERE / "checked_nvcc.py"), str(self.toolkit.nvcc)]
            flags = ["-std=c++17", "-O3", "-I", str(self.csrc), "-ccbin", cxx[0]]
            flags += ["-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"])]
            flags += ["-Xptxas", "-v,--warn-on-spills", "--expt-relaxed-constexpr"]
            self._rule("nvcc", f"{_quote(wrapper + flags)} $flags -MMD -MF $out.d -c $in -o $out", depfile=True)

    def _cpp_objects(self) -> None:
        """The plainest instruction set first: of two copies of an inline function the linker keeps the first."""
        sources = [s for s in sorted(self.csrc.rglob("*.cpp")) if "emulator" not in s.relative_to(self.csrc).parts]
        if self.toolkit:
            sources.remove(self.csrc / "no_cuda.cpp")
        for source in sources:
            if not toolchain.instruction_sets_of(source):
                self._object(source, "cxx", "", self._flags_of(source))
        for isa, isa_flags in toolchain.instruction_sets().items():
            for source in sources:
                if isa in toolchain.instruction_sets_of(source):
                    defines = [f"-DFASTLM_ISA={isa}", f"-DFASTLM_ISA_IS_{isa.upper()}"]
                    self._object(source, "cxx", f".{isa}", [*isa_flags, *defines])

    def _flags_of(self, source: Path) -> list[str]:
        if source.name == "bindings.cpp":
            return self._python_flags()
        return ["-I", str(self.folder)] if source.name == "build_info.cpp" else []

    def _cuda_objects(self, toolkit: cuda_toolkit.Toolkit) -> None:
        """A file named *_sm90.cu holds code for sm_90a alone and is compiled for nothing else."""
        hopper = [arch for arch in toolkit.archs if arch == "90a"]
        for source in sorted(self.csrc.rglob("*.cu")):
            if "emulator" in source.relative_to(self.csrc).parts:
                continue
            archs = hopper if source.stem.endswith("_sm90") and hopper else toolkit.archs
            self._object(source, "nvcc", "", cuda_toolkit.gencode(archs))

    def _python_flags(self) -> list[str]:
        import pybind11

        includes = dict.fromkeys([pybind11.get_include(), *(sysconfig.get_path(p) for p in ("include", "platinclude"))])
        return [word for include in includes for word in ("-isystem", include)]

    def _object(self, source: Path, rule: str, suffix: str, flags: list[str]) -> None:
        target = self.folder / "obj" / source.relative_to(self.csrc)
        target = target.with_name(f"{target.name}{suffix}.o")
        self.objects.append(target)
        self._edge(target, rule, [source], {"flags": _quote(flags)})

    def _rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def _edge(self, target: Path, rule: str, inputs: list[Path], variables: dict[str, str]) -> None:
        self.lines.append(f"build {_path(target)}: {rule} {' '.join(_path(i) for i in inputs)}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]


def _write_if_changed(path: Path, text: str) -> None:
    """Keeps the time stamp of what is the same, so that nothing is rebuilt for it."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_config(folder: Path, values: dict[str, str]) -> None:
    """fastlm_build_config.h: what csrc/common/build_info.cpp reports."""
    lines = ["#pragma once"]
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
        lines.append(f'#define FASTLM_BUILD_{name} "{escaped}"')
    _write_if_changed(folder / "fastlm_build_config.h", "\n".join(lines) + "\n")
