"""Several processes: their loss curve is that of one process with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlm.training import choose_checkpoint, start_run
from fastlm.training.config import config_to_toml
from fastlm.training.journal import read_journal
from tests.training_runs import one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


# Every run of the test in one launch, for the imports of two processes take longer than all of them together.
DRIVER = """
import sys
from pathlib import Path
import torch.distributed as dist
from fastlm.training import load_config, resume_run, start_run
from tests.training_runs import quiet

dist.init_process_group("gloo")  # one for all runs
folder = Path(sys.argv[1])
for name in ("two", "whole", "halves"):
    start_run(load_config(folder / f"{name}.toml"), folder / name, display=quiet())
resume_run(folder / "halves", overrides=("training.steps=12",), display=quiet())
dist.destroy_process_group()
"""


def torchrun(script: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def values(run: Path, kind: str, *names: str) -> list[list[Any]]:
    return [[r[name] for name in names] for r in read_journal(run / "log.jsonl") if r["kind"] == kind]


def test_two_processes_give_the_losses_of_one_and_go_on_exactly(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data")
    plain = {"dropout": 0.0}
    constant = {"schedule": "constant"}
    configs = {
        "two": tiny_config(data, model=plain, training={"batch_size": 4}),
        "whole": tiny_config(data, training=constant),
        "halves": tiny_config(data, training={**constant, "steps": 6}),
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.toml").write_text(config_to_toml(config))
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun(tmp_path / "driver.py", tmp_path)

    start_run(tiny_config(data, model=plain, training={"batch_size": 8}), tmp_path / "one", display=quiet())
    for kind, names in (("step", ("step", "loss", "grad_norm", "lr", "tokens")), ("eval", ("step", "val_loss"))):
        expected = values(tmp_path / "one", kind, *names)
        got = values(tmp_path / "two", kind, *names)
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)

    # With dropout, which each process draws for itself: six steps and six more are twelve.
    assert values(tmp_path / "halves", "resume", "step", "processes") == [[6, 2]]
    names = ("step", "loss", "grad_norm")
    assert values(tmp_path / "halves", "step", *names) == values(tmp_path / "whole", "step", *names)
    weights = [choose_checkpoint(tmp_path / r, "last").model_path / "model.safetensors" for r in ("whole", "halves")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
