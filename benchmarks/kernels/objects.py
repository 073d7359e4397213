"""The .cu files of csrc/ compiled by nvcc, one object an architecture, and what ptxas says about each kernel in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC, FOLDER = ROOT / "csrc", ROOT / "build" / "kernels"
FLAGS = ["-std=c++17", "-O3", "-I", str(CSRC), "--expt-relaxed-constexpr", "-Xptxas", "-v"]  # as build_tools has them


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture, in bytes and registers a thread."""

    arch: str
    source: str  # relative to csrc/
    symbol: str  # mangled
    registers: int
    static_shared: int
    spills: int  # bytes stored and loaded


class Missing(Exception):
    """A tool of the CUDA toolkit that is not here; the message says which."""


def tool(name: str) -> str:
    """nvcc or cuobjdump: of CUDA_HOME, of PATH, or the one that Triton brings."""
    candidates = [Path(os.environ["CUDA_HOME"], "bin", name)] if os.environ.get("CUDA_HOME") else []
    found = shutil.which(name)
    candidates += [Path(found)] if found else []
    try:
        import triton

        candidates.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    except ImportError:
        pass
    for path in candidates:
        if path.is_file():
            return str(path)
    raise Missing(f"there is no {name}: not in CUDA_HOME, not in PATH, not in Triton")


def sources(arch: str) -> list[Path]:
    """What is compiled for an architecture: *_sm90.cu holds code for sm_90a alone."""
    files = [f for f in sorted(CSRC.rglob("*.cu")) if "emulator" not in f.relative_to(CSRC).parts]
    return [f for f in files if arch == "sm_90a" or not f.stem.endswith("_sm90")]


def compile_one(source: Path, arch: str, nvcc: str) -> Path:
    """The object; compiled where the source, or a header that it includes, is newer. ptxas's words lie beside it."""
    target = FOLDER / arch / source.relative_to(CSRC).with_suffix(".cu.o")
    depends, log = target.with_suffix(".o.d"), target.with_suffix(".o.log")
    if target.is_file() and depends.is_file() and log.is_file():
        names = depends.read_text().partition(":")[2].replace("\\\n", " ").split()
        inputs = [Path(name) for name in names if Path(name).is_relative_to(CSRC)]
        if all(f.is_file() and f.stat().st_mtime < target.stat().st_mtime for f in inputs):
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    number = arch.removeprefix("sm_")
    command = [nvcc, *FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "-MMD", "-MF", str(depends)]
    done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source.relative_to(ROOT)}:\n{done.stderr}")
    log.write_text(done.stdout + done.stderr)
    return target


def kernels_of(log: str, arch: str, source: str) -> Iterator[Kernel]:
    """What ptxas -v reported of every kernel."""
    for part in log.split("Compiling entry function '")[1:]:
        symbol = part.partition("'")[0]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if registers is None or spill is None:
            raise ValueError(f"ptxas -v does not give the registers and spills of {symbol}:\n{part[:400]}")
        spills = int(spill[1]) + int(spill[2])
        yield Kernel(arch, source, symbol, int(registers[1]), int(shared[1]) if shared else 0, spills)


def demangled(symbols: list[str]) -> dict[str, str]:
    """Mangled names to C++ names without the parameters; as they are where there is no c++filt."""
    filt = shutil.which("c++filt")
    if filt is None or not symbols:
        return {s: s for s in symbols}
    text = subprocess.run([filt, "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return dict(zip(symbols, map(short_name, text.splitlines()), strict=True))


def short_name(name: str) -> str:
    """fastlm::cuda::(anonymous namespace)::forward<__nv_bfloat16, 64, false> as forward<bf16, 64, false>."""
    name = re.sub(r"^void ", "", name.strip())
    name = re.sub(r"\(anonymous namespace\)::|fastlm::cuda::|fastlm::|\((?:int|bool|long)\)", "", name)
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("float", "f32")
