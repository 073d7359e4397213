"""Whether and how the CUDA sources are compiled: FASTLM_CUDA, FASTLM_CUDA_ARCHS, and where nvcc is."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from toolchain import BuildError

# sm_80: A100, and as the same major version RTX 30 and 40. sm_90a: H100 and H200 with wgmma and TMA (the "a" features
# run on no other GPU). compute_90 is PTX, which the driver compiles for whatever is newer; it is the highest
# generic target that no newer GPU leaves out, and it brings nothing that sm_90a's own machine code would need.
DEFAULT_ARCHS = ["80", "90a", "90+PTX"]

# The oldest toolkit of CUDA 13: a driver reads PTX of its own version and older, so this PTX runs on every driver that
# runs CUDA 13.
COMPILER_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]

HOW_TO_INSTALL = (
    "install NVIDIA's CUDA toolkit 13 (https://developer.nvidia.com/cuda-downloads) and set CUDA_HOME to it, "
    f"or: pip install {' '.join(repr(wheel) for wheel in COMPILER_WHEELS)}"
)


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: str
    static_runtime: Path  # libcudart_static.a
    archs: list[str]


def setting() -> str:
    """FASTLM_CUDA: "auto", "1" or "0"."""
    value = os.environ.get("FASTLM_CUDA", "auto").strip().lower() or "auto"
    if value not in ("auto", "1", "0"):
        raise BuildError(f"FASTLM_CUDA={value!r}; wanted auto, 1 or 0")
    return value


def archs() -> list[str]:
    """FASTLM_CUDA_ARCHS, e.g. "80;90a" or "80;90+PTX"."""
    text = os.environ.get("FASTLM_CUDA_ARCHS", "")
    chosen = [a for a in re.split(r"[;,\s]+", text) if a] or DEFAULT_ARCHS
    for arch in chosen:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise BuildError(f"FASTLM_CUDA_ARCHS={text!r}: {arch!r} is no architecture; wanted e.g. '80;90a;90+PTX'")
    return chosen


def gencode(chosen: list[str]) -> list[str]:
    """nvcc's flags for them: "90a" is machine code, "90+PTX" is PTX alone."""
    flags = []
    for arch in chosen:
        number = arch.removesuffix("+PTX")
        code = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return flags


def find_nvcc() -> Path | None:
    """CUDA_HOME or CUDA_PATH, then PATH, then NVIDIA's wheels."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            nvcc = Path(os.environ[variable], "bin", "nvcc")
            if nvcc.is_file():
                return nvcc
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    for folder in sys.path:
        for pattern in ("nvidia/cu[0-9]*/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc"):
            for nvcc in sorted(Path(folder or ".").glob(pattern)):
                return nvcc
    return None


def driver_version() -> int | None:
    """The CUDA version that the NVIDIA driver runs, as 1000 major + 10 minor; 0: it does not say; None: no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        visible = any(Path(p).exists() for p in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))
        return 0 if visible else None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _driver_too_old() -> str:
    """Why the wheels are of no use here; empty where they are."""
    version = driver_version()
    if not version or version >= 13000:
        return ""
    return (
        f"this machine's driver runs CUDA {version // 1000}.{version % 1000 // 10}, and NVIDIA's compiler comes as "
        "wheels from CUDA 13 on: update the driver (580 or newer), or install the CUDA 12 toolkit and set CUDA_HOME"
    )


def required_wheels() -> list[str]:
    """NVIDIA's compiler, where CUDA is wanted (by FASTLM_CUDA=1, or by a driver) and no nvcc is there."""
    if setting() == "0" or find_nvcc() is not None or not sys.platform.startswith("linux"):
        return []
    if setting() == "1":
        return COMPILER_WHEELS
    return COMPILER_WHEELS if driver_version() is not None and not _driver_too_old() else []


def find_toolkit() -> tuple[Toolkit | None, str]:
    """The toolkit to build with, or None and the reason."""
    if setting() == "0":
        return None, "FASTLM_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        if setting() == "1":
            raise BuildError(f"FASTLM_CUDA=1, and no nvcc in CUDA_HOME, CUDA_PATH, PATH or a wheel: {HOW_TO_INSTALL}")
        too_old = _driver_too_old()
        return None, f"no nvcc was found; {too_old}" if too_old else "no nvcc was found"
    try:
        return _toolkit(nvcc), ""
    except BuildError as error:
        if setting() == "1":
            raise
        return None, str(error)


def _toolkit(nvcc: Path) -> Toolkit:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from None
    version = re.search(r"release ([\d.]+)", text)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)  # where nvcc itself thinks its toolkit is
    if version is None or top is None:
        raise BuildError(f"{nvcc} is not an nvcc that this build understands: {text!r}")
    home = Path(top[1].strip()).resolve()
    if int(version[1].split(".")[0]) < 12:
        raise BuildError(f"{nvcc} is of CUDA {version[1]}; wanted 12.3 or newer. {HOW_TO_INSTALL}")
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib")), home.parent / "cuda_runtime" / "lib"]
    static = next((f / "libcudart_static.a" for f in folders if (f / "libcudart_static.a").is_file()), None)
    if static is None:
        raise BuildError(f"libcudart_static.a is not in {', '.join(map(str, folders))}: {HOW_TO_INSTALL}")
    return Toolkit(nvcc, version[1], static, archs())
