"""Settings of the C library's allocator for training on a CPU.

By default glibc maps every large block anew and gives it back to the system when it is freed, so a training step pays a
page fault for every 4 KB of its activations and gradients. `keep_freed_memory` makes it keep what is freed.
"""

from __future__ import annotations

import ctypes
import sys

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Make the process keep freed memory for its next allocations, as far as the system's C library can.

    It holds for the whole process and for good, so it is the trainer that asks for it (`training.keep_memory`), never
    an import. The memory that the process holds is then its peak so far.

    Returns:
        Whether the C library took the settings: glibc does; others (musl, macOS, Windows) have none.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No mappings of their own for large blocks; nothing of the heap's top goes back; the heap grows by 64 MB.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(option, value) == 1 for option, value in settings])
