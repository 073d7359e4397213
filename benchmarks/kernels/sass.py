"""What the machine code of a kernel does in its hottest loop, read from `cuobjdump -sass` and `-elf`."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", re.MULTILINE)
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
WGMMA = re.compile(r"\bHGMMA\.64x(\d+)x16\b")
# Groups that the table names. Everything else is "other": addresses, predicates, conversions, barriers.
GROUPS = {
    "tensor core": ("HMMA", "HGMMA"),
    "LDSM": ("LDSM",),
    "LDGSTS": ("LDGSTS", "UTMALDG"),
    "global": ("LDG", "STG", "LD", "ST"),
    "shared": ("LDS", "STS"),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "MUFU", "HFMA2", "HADD2", "HMUL2", "F2F", "F2FP", "FSETP", "FSEL"),
}


@dataclass(frozen=True)
class Loop:
    """The instructions of one pass of a loop, by opcode; those of loops inside it count once.

    Args:
        counts: of the loop's body as it lies in the code.
        aside: of the code that it branches to elsewhere and that comes back to it; both sides of its branches count,
            so it is more than one pass executes.
        wavefronts: how often the body reads or writes shared memory for one warp, 128 bytes at most each, where no two
            lanes want the same bank.
        wgmma_columns: of wgmma 64 x columns x 16, where the products are by it; else 0.
    """

    counts: dict[str, int]
    aside: dict[str, int]
    wavefronts: int = 0
    wgmma_columns: int = 0

    @property
    def length(self) -> int:
        return sum(self.counts.values())

    def number(self, group: str) -> int:
        return sum(self.counts.get(op, 0) for op in GROUPS[group])

    def share(self, group: str) -> float:
        return self.number(group) / self.length


def opcode(text: str) -> str:
    """@!P0 HMMA.16816.F32 R4, ... as HMMA."""
    return PREDICATE.sub("", text).split()[0].partition(".")[0]


def wavefronts(text: str) -> int:
    """Of one instruction: LDSM.16.M88.4 reads four matrices of 128 bytes, LDS.64 32 times 8 bytes, and so on."""
    op, *modifiers = PREDICATE.sub("", text).split()[0].split(".")
    if op == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if op not in ("LDS", "STS", "LDGSTS", "ATOMS"):
        return 0
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


def functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """Each kernel's instructions with their addresses."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", sass, flags=re.MULTILINE)
    return {
        name: [(int(at, 16), text) for at, text in INSTRUCTION.findall(body)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of every loop: a branch backwards. The endless one after EXIT (BRA to itself) is none."""
    found = []
    for at, text in instructions:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            found.append((int(target[1], 16), at))
    return found


def wgmma_loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """The innermost loops with wgmma: those around them hold the first pass, or the last, as well.

    A branch that comes back from out of line, as from a wait, closes no loop: its range begins inside of a true one.
    """
    found = loops(instructions)
    true = [(a, b) for a, b in found if not any(low < a <= high < b for low, high in found)]
    products = [at for at, text in instructions if opcode(text) == "HGMMA"]
    own = [(a, b) for a, b in true if any(a <= at <= b for at in products)]
    return [(a, b) for a, b in own if not any((c, d) != (a, b) and a <= c and d <= b for c, d in own)]


def main_loop(instructions: list[tuple[int, str]]) -> Loop | None:
    """Of the loops, with wgmma of the innermost, the one with the most tensor-core instructions; without any, with the
    most loads and stores; of equal ones the shortest. None where the kernel has no loop: a straight line of code that
    each thread runs once."""
    best: tuple[tuple[int, int, int], Loop] | None = None
    found = loops(instructions)
    for first, last in wgmma_loops(instructions) or found:
        counts = _counts(instructions, first, last)
        tensor = sum(counts[op] for op in GROUPS["tensor core"])
        moved = 0 if tensor else sum(counts[op] for op in ("LDG", "LDGSTS", "LD", "STG"))
        key = (tensor, moved, -sum(counts.values()))
        if best is None or key > best[0]:
            aside: Counter[str] = Counter()
            for low, high in found:  # a range that begins before this one and ends in it: what was moved out of line
                if low < first <= high < last:
                    aside = max(aside, _counts(instructions, low, first - 1), key=lambda c: sum(c.values()))
            shared = sum(wavefronts(text) for at, text in instructions if first <= at <= last)
            columns = [int(n[1]) for at, t in instructions if first <= at <= last and (n := WGMMA.search(t))]
            best = key, Loop(dict(counts), dict(aside), shared, max(columns, default=0))
    return best[1] if best else None


def _counts(instructions: list[tuple[int, str]], first: int, last: int) -> Counter[str]:
    return Counter(op for at, text in instructions if first <= at <= last and (op := opcode(text)) != "NOP")


def dump(cuobjdump: str, target: Path) -> dict[str, Loop | None]:
    text = subprocess.run([cuobjdump, "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    return {name: main_loop(body) for name, body in functions(text).items()}


def most_threads(cuobjdump: str, target: Path) -> dict[str, int]:
    """A block's most threads (__launch_bounds__) of each kernel, from the ELF's attributes."""
    text = subprocess.run([cuobjdump, "-elf", str(target)], capture_output=True, text=True, check=True).stdout
    return threads_of(text)


def threads_of(elf: str) -> dict[str, int]:
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        attribute = re.search(
            r"EIATTR_(?:MAX|REQ)_?(?:THREADS|NTID)\s+Format:\s+\S+\s+Value:\s+((?:0x[0-9a-f]+ ?)+)", part
        )
        if attribute:
            x, y, z = (int(n, 16) for n in attribute[1].split())
            found[part.split()[0]] = x * y * z
    return found
