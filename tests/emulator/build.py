"""Compiles .cu files with g++ for the emulator (csrc/emulator): by ninja, again only what changed.

Three flavours: "plain" for shared libraries that tests load, "address" and "thread" for executables under
AddressSanitizer and ThreadSanitizer. The emulator itself is compiled once, without a sanitizer, and linked first: where
the same inline function is in both, the linker keeps the emulator's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FOLDER = Path(os.environ.get("FASTLM_EMULATOR_BUILD", ROOT / "build" / "emulator"))
SANITIZERS = {"plain": [], "address": ["-fsanitize=address", "-O1"], "thread": ["-fsanitize=thread", "-O1"]}
FLAGS = ["-std=c++17", "-O2", "-g1", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]


class Unavailable(Exception):
    """The emulator cannot be built on this machine; the message says why."""


@functools.cache
def compiler() -> str:
    """g++ (CXX names another one): the emulator needs x86-64 and g++'s or clang's extensions."""
    if os.uname().machine != "x86_64":
        raise Unavailable(f"the emulator runs on x86-64, this is {os.uname().machine}")
    name = os.environ.get("CXX", "g++")
    if shutil.which(name.split()[0]) is None:
        raise Unavailable(f"no C++ compiler {name!r}")
    return name


@functools.cache
def cuda_includes() -> list[Path]:
    """The folders of CUDA's headers: a toolkit's, or those of the wheels nvidia-cuda-runtime, -crt and -cccl."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parents[1]))
    candidates = [[Path(home) / "include"] for home in homes if home]
    for site in map(Path, sys.path):
        candidates += [[folder] for folder in sorted(site.glob("nvidia/cu[0-9]*/include"))]
    for folders in candidates:
        folders = folders + [f / "cccl" for f in folders if (f / "cccl").is_dir()]
        wanted = ["cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "crt/host_config.h", "nv/target"]
        if all(any((f / header).is_file() for f in folders) for header in wanted):
            return folders
    raise Unavailable("no CUDA headers: neither a toolkit nor the wheels nvidia-cuda-runtime, -crt and -cccl (CUDA 13)")


class Ninja:
    """A build.ninja under construction. Every method returns the path that it builds."""

    def __init__(self, name: str):
        self.file = FOLDER / f"{name}.ninja"
        includes = [word for folder in cuda_includes() for word in ("-isystem", str(folder))]
        base = [*shlex.split(compiler()), *FLAGS, *includes, "-I", str(CSRC)]
        self.lines = [
            f"rule cxx\n  command = {_quote(base)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {_quote(shlex.split(compiler()))} $flags $in -o $out $libraries",
            "rule weaken\n  command = objcopy --wildcard --weaken-symbol='_ZN*6fastlm*' $in $out",
        ]
        self.made: set[Path] = set()

    def _edge(self, target: Path, rule: str, inputs: list[Path], **variables: list[str]) -> Path:
        if target not in self.made:
            self.made.add(target)
            self.lines.append(f"build {target}: {rule} {' '.join(map(str, inputs))}")
            self.lines += [f"  {name} = {_quote(words)}" for name, words in variables.items()]
        return target

    def object(self, source: Path, flavour: str = "plain", flags: tuple[str, ...] = ()) -> Path:
        target = FOLDER / flavour / source.relative_to(ROOT).with_name(source.name + ".o")
        language = ["-x", "c++", "-Wno-unknown-pragmas"] if source.suffix == ".cu" else []
        return self._edge(target, "cxx", [source], flags=[*SANITIZERS[flavour], *flags, *language])

    def runtime(self) -> list[Path]:
        """The emulator: always without a sanitizer."""
        return [self.object(source, flags=("-O3",)) for source in sorted((CSRC / "emulator").glob("*.cpp"))]

    def library(self, name: str, objects: list[Path]) -> Path:
        return self._edge(FOLDER / f"{name}.so", "link", [*self.runtime(), *objects], flags=["-shared"])

    def program(self, name: str, flavour: str, objects: list[Path]) -> Path:
        target = FOLDER / flavour / name
        return self._edge(target, "link", [*self.runtime(), *objects], flags=SANITIZERS[flavour])

    def weakened(self, target: Path) -> Path:
        """The object with our symbols weak: functions of fastlm that nobody defines become null, not an error."""
        return self._edge(target.with_suffix(".weak.o"), "weaken", [target])

    def run(self) -> None:
        """Builds everything. Raises Unavailable without ninja, RuntimeError with the compiler's messages."""
        command = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        with one_at_a_time():
            text = "\n".join(self.lines) + "\n"
            if not self.file.is_file() or self.file.read_text() != text:
                self.file.write_text(text)
            run = [*map(str, command), "-C", str(FOLDER), "-f", self.file.name, "--quiet"]
            try:
                result = subprocess.run(run, capture_output=True, text=True)
            except OSError as error:
                raise Unavailable(f"ninja does not run: {error}") from None
            if result.returncode != 0:
                raise RuntimeError(f"compiling for the emulator failed:\n{result.stdout}\n{result.stderr}")


def python_includes() -> tuple[str, ...]:
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed") from None
    folders = dict.fromkeys([pybind11.get_include(), *(sysconfig.get_path(p) for p in ("include", "platinclude"))])
    return tuple(word for folder in folders for word in ("-isystem", folder))


def _quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """A lock on the folder: pytest's workers must not build the same files together."""
    import fcntl

    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
