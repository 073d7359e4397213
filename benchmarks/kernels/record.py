"""What Triton's compiler made of each kernel, in a file: a line each, with a digest of the code that it was made of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastlm.ops.triton_support.ahead import Compiled, Launch
from fastlm.ops.triton_support.target import ARCHITECTURES

PATH = Path(__file__).with_name("triton.json")

Name = tuple[str, str, str, str]  # architecture, kernel, configuration, key of the arguments


def name(done: Compiled) -> Name:
    return done.arch, done.kernel, done.config, done.key


def installed() -> str:
    import triton

    return triton.__version__


@dataclasses.dataclass
class Record:
    """The kernels that were compiled, and by which Triton."""

    triton: str
    kernels: dict[Name, Compiled]

    def same_compiler(self) -> bool:
        return self.triton == installed()

    def has(self, arch: str, launch: Launch, any_version: bool = False) -> bool:
        """Whether the launch was compiled, from the code as it is, by the Triton that is installed (or any)."""
        done = self.kernels.get((arch, *launch.identity))
        return done is not None and done.source == launch.source and (any_version or self.same_compiler())

    def add(self, done: Compiled) -> None:
        """Store a result, on disk too. Results of another Triton are left behind: they cannot stand side by side."""
        if not self.same_compiler():
            self.triton, self.kernels = installed(), {}
        self.kernels[name(done)] = done
        self._save()

    def keep(self, names: Iterable[Name]) -> None:
        """Leave out whatever else there is."""
        self.kernels = {n: self.kernels[n] for n in names}
        self._save()

    def _save(self) -> None:
        ordered = sorted(self.kernels, key=lambda n: (ARCHITECTURES.index(n[0]), n))
        lines = [json.dumps(dataclasses.asdict(self.kernels[n])) for n in ordered]
        separator = ",\n"
        temporary = PATH.with_suffix(f".{os.getpid()}")
        temporary.write_text(f'{{"triton": {json.dumps(self.triton)}, "kernels": [\n{separator.join(lines)}\n]}}\n')
        temporary.replace(PATH)


def load() -> Record:
    """The file's contents; nothing where there is none."""
    if not PATH.exists():
        return Record(installed(), {})
    contents = json.loads(PATH.read_text())
    kernels = [Compiled(**{**k, "instructions": tuple(k["instructions"])}) for k in contents["kernels"]]
    return Record(contents["triton"], {name(k): k for k in kernels})
