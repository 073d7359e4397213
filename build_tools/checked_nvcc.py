"""Runs nvcc and fails where the machine code is not what a kernel was designed for.

    checked_nvcc.py NVCC ARGUMENTS...

Fails on register spills, and on ptxas's reports that it serialised wgmma instructions (C7510, C7511, C7514, C7515):
both leave the result right and the kernel slow, so nothing else would notice. A kernel that may spill says so, and why,
in its source file, by a part of its mangled name:

    // fastlm: allow-spills NAME: reason
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SERIALISED = re.compile(r"\(?C75(?:10|11|14|15)\)?")
FUNCTION = re.compile(r"Function properties for (\S+)|Compiling entry function '(\S+)' for '(\S+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
ALLOWED = re.compile(r"//\s*fastlm: allow-spills (\S+): \S")


def problems(log: str, allowed: list[str]) -> list[str]:
    """What must fail the build, from nvcc's output with -Xptxas -v."""
    found, function, arch = [], "?", "?"
    for line in log.splitlines():
        if SERIALISED.search(line):
            found.append(line.strip())
        if match := FUNCTION.search(line):
            function = match[1] or match[2]
            arch = match[3] or arch
        spill = SPILL.search(line)
        if spill and (int(spill[1]) or int(spill[2])) and not any(name in function for name in allowed):
            found.append(f"{function} ({arch}) spills registers: {spill[0]}")
    return found


def main(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        print(done.stdout, end="")
        return done.returncode
    source = Path(command[command.index("-c") + 1])
    found = problems(done.stdout, ALLOWED.findall(source.read_text(encoding="utf-8")))
    quiet = ("ptxas info", "bytes stack frame", "Compile time =")
    for line in done.stdout.splitlines():
        if line.strip() and not any(words in line for words in quiet):
            print(line)
    if not found:
        return 0
    Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    print(f"{source}: the kernels below would be slow, so the build stops here:", *found, sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
