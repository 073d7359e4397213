"""The bits of large matrix products on a CPU, which MKL makes for torch on x86-64.

MKL may cut the depth of a product among the threads, and then the last bits of its sums follow their number. The strict
mode of its "conditional numerical reproducibility" rules that out.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def fix_order() -> bool:
    """Ask MKL for products with the same bits on any number of threads; whether it was asked.

    MKL reads the environment variable MKL_CBWR at its first product: what the user has set there is kept, and after
    that product nothing changes any more. On Intel processors strict mode is as fast (docs/cpu.md). On others it may
    choose older instructions, so there it is left to the user.
    """
    if "MKL_CBWR" not in os.environ and processor() == "GenuineIntel":
        os.environ["MKL_CBWR"] = "AUTO,STRICT"
    return "STRICT" in os.environ.get("MKL_CBWR", "")


@functools.cache
def processor() -> str:
    """Its maker, as far as the system says: "GenuineIntel", "AuthenticAMD" or ""."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:1000]
    except OSError:  # no Linux
        return ""
    return next((maker for maker in ("GenuineIntel", "AuthenticAMD") if maker in text), "")
