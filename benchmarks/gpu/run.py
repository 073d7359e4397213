"""The run: the parts in order, each in a process of its own with its budget; the report after each."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import proof, speed
from benchmarks.gpu.record import LeftOut, Record, write
from fastlm.bench import report
from fastlm.bench.timing import reason_of

ROOT = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE_CORES = 8


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Args:
        name: of its section and file.
        seconds: after which it is cut off.
        run: gets its record and the folder of all records.
        measures: it has the machine to itself; the others run side by side where there are cores for it.
    """

    name: str
    seconds: float
    run: Callable[[Record, Path], None]
    measures: bool = False


def compiled(record: Record, folder: Path) -> None:
    """The resource report, where there is no GPU; where there is one, its time is better spent."""
    if torch.cuda.is_available():
        raise LeftOut("there is a GPU to measure on; python -m benchmarks.kernels cuda has this")
    from benchmarks.kernels import cuda, objects

    try:
        nvcc, cuobjdump = objects.tool("nvcc"), objects.tool("cuobjdump")
    except objects.Missing as error:
        raise LeftOut(str(error)) from None
    table = record.table("Compiled for sm_80", ("kernels", "most registers", "with spills"))
    kernels, _, _ = cuda.compiled("sm_80", nvcc, cuobjdump)
    table.add(len(kernels), max(k.registers for k in kernels), sum(k.spills > 0 for k in kernels))


# The order: what is wrong is found before anything is measured. The budgets add up to under ten minutes.
PARTS = (
    Part("conformance", 100, lambda r, _: proof.conformance(r)),
    Part("op suite", 110, lambda r, _: proof.op_suite(r)),
    Part("sanitizer", 60, lambda r, _: proof.sanitizer(r)),
    Part("determinism", 30, lambda r, _: proof.determinism(r)),
    Part(speed.NAME, 20, lambda r, _: speed.ceilings(r), measures=True),
    Part("ops", 110, lambda r, folder: speed.every_op(r, known=speed.known_ceilings(folder)), measures=True),
    Part("training", 100, lambda r, folder: speed.training(r, known=speed.known_ceilings(folder)), measures=True),
    Part("decode", 40, lambda r, _: speed.decode(r), measures=True),
    Part("compiled", 300, compiled),  # only without a GPU
)


def run_part(part: Part, folder: Path) -> Record:
    """In this process."""
    record = Record(folder / f"{part.name}.json")
    record.save()
    try:
        part.run(record, folder)
        record.finish("done")
    except LeftOut as reason:
        record.finish("left out", str(reason))
    except Exception as error:
        record.finish("failed", reason_of(error))
    return record


def run_apart(command: Sequence[str], seconds: float) -> str | None:
    """In a process of its own, with all that it starts. None, or why it did not end by itself."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"cut off after its {seconds:.0f} s"
    return None if code == 0 else f"its process ended with {code}"


def run(out: Path, parts: Sequence[Part], where: dict[str, Any], apart: bool = True) -> tuple[Path, Path]:
    """All parts; the two reports are written after each of them. Returns their paths."""
    stem = out / f"{where['date'][:10]}-{slug(where['gpu'] or 'no-gpu')}"
    folder = out / f".{stem.name}.parts"
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    json_path, text_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".md")
    for group in _groups(parts, side_by_side=apart and (os.cpu_count() or 1) >= SIDE_BY_SIDE_CORES):
        with ThreadPoolExecutor(len(group)) as pool:
            for part, content in zip(group, pool.map(lambda p: _run_one(p, folder, apart), group), strict=True):
                results[part.name] = content
        write(json_path, json.dumps({"environment": where, "parts": results}, indent=1) + "\n")
        write(text_path, markdown(where, results))
    for path in folder.glob("*.json"):
        path.unlink()
    folder.rmdir()
    return json_path, text_path


def _groups(parts: Sequence[Part], side_by_side: bool) -> list[list[Part]]:
    """The parts that run at the same time, in their order."""
    groups: list[list[Part]] = []
    for part in parts:
        if side_by_side and groups and not (part.measures or groups[-1][-1].measures):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _run_one(part: Part, folder: Path, apart: bool) -> dict[str, Any]:
    """What the part has found, in its own process or in this one."""
    print(f"{part.name}, {part.seconds:.0f} s at most", flush=True)
    path = folder / f"{part.name}.json"
    path.unlink(missing_ok=True)
    ended = None
    if apart:
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--folder", str(folder)]
        ended = run_apart(command, part.seconds)
    else:
        run_part(part, folder)
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else Record().content
    if ended is not None and content["status"] == "cut off":
        content["reason"] = ended
    because = f": {content['reason']}" if content["reason"] else ""
    print(f"  {part.name}: {content['status']}{because}", flush=True)
    return content


def environment() -> dict[str, Any]:
    """That of `fastlm bench`, with the GPU's driver, and the date first."""
    where = report.environment()
    where["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    where["driver"], where["cuda"] = _driver(), torch.version.cuda
    return where


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


def slug(name: str) -> str:
    """NVIDIA H100 80GB HBM3 as nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def markdown(where: dict[str, Any], results: dict[str, Any]) -> str:
    """The report as text: where, what became of each part, then their tables and notes."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    lines = [f"# {where['gpu'] or 'No GPU: ' + where['cpu']}", ""]
    lines += [f"{where['date']}, fastlm {where['fastlm']}, commit {where['commit']}; driver {where['driver']};"]
    lines += [f"CUDA of torch {where['cuda']}; Python {where['python']}; {versions}.", ""]
    lines += ["| part | result | because |", "|---|---|---|"]
    lines += [f"| {name} | {part['status']} | {_cell(part['reason'] or '')} |" for name, part in results.items()]
    for name, part in results.items():
        tables = [t for t in part["tables"] if t["rows"]]
        if not tables and not part["notes"]:
            continue
        lines += ["", f"## {name}"]
        for table in tables:
            lines += ["", f"**{table['title']}**", "", f"| {' | '.join(table['header'])} |"]
            lines += ["|---" * len(table["header"]) + "|"]
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in table["rows"]]
        lines += [""] if part["notes"] else []
        lines += [f"- {note}" for note in part["notes"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
