"""Builds fastlm._C, the compiled kernels. What the package is stands in pyproject.toml.

    pip install .                          everything, in pip's isolated build
    python setup.py build_ext --inplace    for development: fastlm/_C*.so, recompiling what changed

FASTLM_CUDA=auto|1|0, FASTLM_CUDA_ARCHS="80;90a", CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import cuda_toolkit  # noqa: E402
import ninja_file  # noqa: E402
import toolchain  # noqa: E402


def git_commit() -> str:
    """The checkout's commit, with a + where files were changed since; empty without git."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        run = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*run, "diff", "--quiet", "HEAD", "--", "csrc"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


class NinjaBuild(build_ext):
    """Compiles csrc/ by ninja: in parallel, and again only what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_module(Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve())
        except toolchain.BuildError as error:
            raise SystemExit(f"fastlm: {error}") from None

    def copy_extensions_to_source(self) -> None:  # --inplace, and an editable installation
        for ext in self.extensions:
            file = self.get_ext_filename(ext.name)
            replace(Path(self.build_lib, file), ROOT / file)

    def build_module(self, folder: Path, target: Path) -> None:
        toolkit, reason = cuda_toolkit.find_toolkit()
        if toolkit:
            print(f"fastlm: CUDA {toolkit.version} ({toolkit.nvcc}), {' '.join(toolkit.archs)}", flush=True)
        else:
            print(f"fastlm: without CUDA kernels: {reason}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with one_build_at_a_time(folder):
            config = {
                "VERSION": self.distribution.get_version(),
                "GIT_COMMIT": git_commit(),
                "COMPILER": toolchain.compiler_version(toolchain.compiler()),
                "CUDA": toolkit.version if toolkit else "",
                "CUDA_ARCHS": " ".join(toolkit.archs) if toolkit else "",
                "CUDA_REASON": reason,
            }
            ninja_file.write_config(folder, config)
            file = ninja_file.NinjaFile(ROOT, folder, toolkit)
            file.write()
            run_ninja(folder)
            replace(file.module, target)


def replace(source: Path, target: Path) -> None:
    """Copies in one step: a process that has the old module mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copyfile(source, fresh)
    fresh.chmod(0o755)
    os.replace(fresh, target)


def run_ninja(folder: Path) -> None:
    on_path = shutil.which("ninja")
    command = [on_path] if on_path else [sys.executable, "-m", "ninja"]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    try:
        subprocess.run([*command, "-C", str(folder), "--quiet"], check=True)
    except subprocess.CalledProcessError:
        raise toolchain.BuildError("compiling csrc/ failed; the messages above say where") from None


class one_build_at_a_time:
    """A lock on the build folder: two builds of one tree would write the same files."""

    def __init__(self, folder: Path):
        self.file = open(folder / "lock", "w")  # noqa: SIM115

    def __enter__(self) -> None:
        import fcntl

        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *exception: object) -> None:
        self.file.close()


setup(ext_modules=[Extension("fastlm._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
