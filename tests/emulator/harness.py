"""Runs the kernels of tests/emulator/kernels: each reads an array of 32-bit words and writes another."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.emulator import build

KERNELS = Path(__file__).parent / "kernels"
SCHEDULES = [("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2)]


class KernelError(Exception):
    """What a launch reported."""


@contextlib.contextmanager
def schedule(name: str, seed: int = 0) -> Iterator[None]:
    """The emulator's order of threads inside the block."""
    names = {"FASTLM_EMULATOR_SCHEDULE": name, "FASTLM_EMULATOR_SEED": str(seed)}
    before = {k: os.environ.get(k) for k in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for k, v in before.items():
            if v is None:
                del os.environ[k]
            else:
                os.environ[k] = v


def aligned(words: np.ndarray) -> np.ndarray:
    """A copy whose first word is 128-byte aligned."""
    words = np.ascontiguousarray(words).view(np.uint32).reshape(-1)
    room = np.zeros(words.size + 64, np.uint32)
    start = -room.ctypes.data % 128 // 4
    room[start : start + words.size] = words
    return room[start : start + words.size]


class Harness:
    """A loaded library of kernels, by name."""

    def __init__(self, library: Path):
        self.c = ctypes.CDLL(str(library))
        self.c.harness_name.restype = self.c.harness_run.restype = ctypes.c_char_p
        self.index = {self.c.harness_name(i).decode(): i for i in range(self.c.harness_count())}

    def sizes(self, name: str) -> tuple[int, int]:
        """Words read, words written."""
        i = self.index[name]
        return self.c.harness_in_words(i), self.c.harness_out_words(i)

    def run(self, name: str, read: np.ndarray, written: np.ndarray | None = None) -> np.ndarray:
        """The words after the kernel has run; `written` is what they were before (default: zeros)."""
        in_words, out_words = self.sizes(name)
        read = aligned(read)
        out = aligned(np.zeros(out_words, np.uint32) if written is None else written)
        assert read.size == in_words, f"{name} reads {in_words} words, got {read.size}"
        assert out.size == out_words, f"{name} writes {out_words} words, got {out.size}"
        word = ctypes.POINTER(ctypes.c_uint32)
        error = self.c.harness_run(self.index[name], read.ctypes.data_as(word), out.ctypes.data_as(word))
        if error is not None:
            raise KernelError(error.decode())
        return out.copy()


def load_for_gpu(*sources: str) -> Harness:
    """Compiles them with nvcc for sm_90a. Raises build.Unavailable without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise build.Unavailable("there is no nvcc")
    folder = build.FOLDER / "gpu"
    with build.one_at_a_time():
        folder.mkdir(exist_ok=True)
        flags = ["-std=c++17", "-O2", "-I", str(build.CSRC), "-gencode", "arch=compute_90a,code=sm_90a"]
        files = [KERNELS / f"{name}.cu" for name in ("harness_main", *sources)]
        objects = [folder / f"{file.stem}.o" for file in files]
        headers = [*(build.CSRC / "common").rglob("*.h"), *KERNELS.glob("*.h")]
        changed = max(h.stat().st_mtime for h in headers)
        commands = [
            [nvcc, *flags, "-Xcompiler", "-fPIC", "-c", str(file), "-o", str(o)]
            for file, o in zip(files, objects, strict=True)
            if not o.is_file() or o.stat().st_mtime < max(changed, file.stat().st_mtime)
        ]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands))
        library = folder / f"{sources[0]}.so"
        link = [nvcc, "-shared", "-cudart", "static", *map(str, objects), "-o", str(library)]
        results.append(subprocess.run(link, capture_output=True, text=True))
    for result in results:
        if result.returncode != 0:
            raise RuntimeError(f"nvcc failed:\n{result.stderr}")
    return Harness(library)


def load(*sources: str) -> Harness:
    """Compiles kernels/<source>.cu for the emulator and loads them."""
    ninja = build.Ninja(sources[0])
    files = [KERNELS / "harness_main.cu", *(KERNELS / f"{s}.cu" for s in sources)]
    library = ninja.library(sources[0], [ninja.object(f) for f in files])
    ninja.run()
    return Harness(library)
