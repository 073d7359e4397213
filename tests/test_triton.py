"""How the Triton kernels are chosen, refused, tuned and compiled. What they compute: test_ops.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fastlm
from fastlm import ops
from fastlm.ops import registry
from fastlm.ops.layer_norm import triton as layer_norm
from fastlm.ops.linear import triton as linear
from fastlm.ops.triton_support import Config, Example, Kernel, ahead, gemm, tuned, tuning
from tests.conftest import ROOT

# One kernel of each kind, small: (architecture, op, part of the example's name, part of the kernel's name)
WANTED = [
    ("sm_80", "layer_norm", "768 bfloat16 residual bfloat16", "forward"),
    ("sm_90", "linear_act", "4096 rows 768 relu bfloat16", "linear_act"),
    ("gfx942", "layer_norm", "768 bfloat16 residual bfloat16", "backward"),
]
COMPILE = """
import json, sys
from fastlm.ops.triton_support import ahead
for arch, op, example, kernel in json.loads(sys.argv[1]):
    found = [l for l in ahead.launches(arch, [op]) if example in l.example and l.kernel.label.endswith("." + kernel)]
    done = ahead.compile_launch(found[0], arch)
    print(json.dumps([arch, done.kernel, done.registers, done.problem(), sorted(done.instructions)]))
"""


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, json.dumps(WANTED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r[0] for r in results] == [w[0] for w in WANTED]
    for _, kernel, registers, problem, _ in results:
        assert problem is None and 0 < registers <= 512, kernel
    assert {"wgmma.mma_async", "cp.async.bulk.tensor"} <= set(results[1][4])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_record_is_of_these_kernels(arch: str, tmp_path: Path) -> None:
    """Every kernel is in it, without a spill; the first launch of each is compiled again to what it says."""
    recorded = json.loads((ROOT / "benchmarks" / "kernels" / "triton.json").read_text())["triton"]
    installed = importlib.metadata.version("triton")
    if installed != recorded:
        pytest.skip(f"the record is of Triton {recorded}, this is {installed}")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.kernels", "triton", "--check", "--arch", arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_op_with_triton_kernels_has_examples_and_configurations() -> None:
    for module in ahead.modules().values():
        kernels = [value for value in vars(module).values() if isinstance(value, Kernel)]
        example = next(iter(module.examples(torch.device("meta"))), None)
        # the linear layer is a product without an epilogue, which is left to the library
        assert (example is not None) == bool(kernels) == (module is not linear), module.__name__


def test_every_op_has_a_triton_backend() -> None:
    assert [op for op, backends in registry.implementations().items() if "triton" not in backends] == []


def test_auto_never_takes_the_interpreter() -> None:
    call = (torch.ones(2, 8), torch.ones(8), None, None, 1e-5, False)
    assert registry.choose("layer_norm", "cpu", call) != "triton"
    assert "triton" not in registry.AUTO_ORDER["cpu"] and registry.AUTO_ORDER["cuda"][1] == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors are refused before this check on a GPU machine")
def test_what_it_cannot_do_is_refused_by_name() -> None:
    width = layer_norm.WIDEST + 1
    message = rf"'triton' cannot run layer_norm here: its kernels are for widths up to 1,073,741,824, got {width}"
    with fastlm.backend("triton"), pytest.raises(fastlm.UnsupportedError, match=message):
        ops.layer_norm(torch.ones(1, 1).expand(1, width), torch.ones(1).expand(width))
    with fastlm.backend("triton"), pytest.raises(fastlm.UnsupportedError, match=r"got torch\.float64"):
        ops.layer_norm(torch.ones(2, 8).double(), torch.ones(8).double())


def test_tiles_depend_on_the_number_of_rows_in_three_steps_only() -> None:
    assert {gemm.height(rows) for rows in range(1, 3000)} == {"low", "middle", "high"}


def test_tuning_measures_every_candidate_and_stores_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = tuple(Config(BLOCK=block) for block in (64, 128, 256))
    kernel = Kernel("fastlm.ops.none:kernel", lambda arch, problem: candidates)
    seconds = iter((3.0, 1.0, 2.0))

    def call() -> None:
        kernel(kernel.config(torch.device("cpu"), ("bf16", 64)), (1, 1, 1))

    monkeypatch.setattr(kernel, "start", lambda *arguments: None)
    ((_, choices),) = tuning.measure([Example("one", call)], lambda launch: next(seconds))
    assert choices[0].best() is candidates[1] and len(choices[0].times) == 3
    monkeypatch.setenv("FASTLM_TUNED", str(tmp_path / "cache" / "triton.json"))
    tuned.table.cache_clear()
    file = tuned.store("GPU", {"none.kernel": {repr(choices[0].problem): choices[0].best().as_dict()}})
    stored = json.loads(file.read_text())["GPU"]["none.kernel"]["('bf16', 64)"]
    assert candidates[1].same(stored) and not candidates[0].same(stored)
    tuned.table.cache_clear()


def test_a_broken_file_of_tuned_configurations_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "triton.json"
    file.write_text("{")
    monkeypatch.setenv("FASTLM_TUNED", str(file))
    tuned.table.cache_clear()
    with pytest.raises(RuntimeError, match=r"triton\.json: cannot be read .* run `fastlm tune` again"):
        tuned.table()
    tuned.table.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a machine without a GPU")
def test_tuning_without_a_gpu_says_so() -> None:
    from typer.testing import CliRunner

    from fastlm.cli import app

    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1 and "fastlm tune measures on a GPU" in result.output
