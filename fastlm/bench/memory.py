"""The peak memory of a training step, each peer in a process of its own.

On a GPU it is torch's own count, torch.cuda.max_memory_allocated. On a CPU nobody counts for us but the operating
system: the largest resident size of the process, libraries included; what the process had before the model is in the
report beside it. One process cannot measure two peers: what the first has freed is still there for the second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastlm.bench.steps import PEERS, SIZES, Trainer
from fastlm.bench.timing import Comparison, Result, reason_of

STEPS = 2  # the optimizer's state is made in the first


def measure(peer: str, size: str, dtype: str, device: str) -> dict[str, Any]:
    """Train in this process, and say how much memory it took, in bytes."""
    before = _peak(device)
    trainer = Trainer(peer, SIZES[size], getattr(torch, dtype), device)
    for _ in range(STEPS):
        trainer.step()
    return {"peak_bytes": _peak(device), "before_bytes": before, "loss": trainer.losses}


def _peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux. Its ru_maxrss begins at the size of the parent, which has run all the peers already.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compare_memory(size: str, dtype: torch.dtype, device: str, skip: set[str]) -> Comparison:
    """The peak memory of a training step of each peer; `error` compares the losses with the first peer's."""
    name = str(dtype).removeprefix("torch.")
    results = [_in_a_process(peer, size, name, device) for peer in PEERS if peer not in skip]
    return Comparison("memory", f"training {SIZES[size]}", "peak memory", name, results)


def _in_a_process(peer: str, size: str, dtype: str, device: str) -> Result:
    command = [sys.executable, "-m", "fastlm.bench.memory", peer, size, dtype, device]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        report = json.loads(run.stdout.splitlines()[-1])
    except Exception as error:
        return Result(peer, reason=reason_of(error))
    if "reason" in report:
        return Result(peer, reason=report["reason"])
    extra = {"before_bytes": report["before_bytes"], "loss": report["loss"]}
    return Result(peer, peak_bytes=report["peak_bytes"], extra=extra)


if __name__ == "__main__":
    try:
        print(json.dumps(measure(*sys.argv[1:5])))
    except Exception as error:
        print(json.dumps({"reason": reason_of(error)}))
