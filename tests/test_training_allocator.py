"""Freed memory stays with the process where training asks for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from fastlm.training.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)  # 64 MB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(16 << 20)
default = faults()
assert keep_freed_memory()
for _ in range(3):
    faults()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert default > 1000, "the measurement shows nothing: the default does not fault either"
    assert kept <= default / 4  # five tensors; the heap may have to grow for one of them once more
