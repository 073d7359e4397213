"""Several processes: their loss curve is that of one process with the same global batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlm.training import choose_checkpoint, start_run
from fastlm.training.checkpoint import find_checkpoints
from fastlm.training.config import config_to_toml
from fastlm.training.journal import read_journal
from tests.training_runs import one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(*arguments: object) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastlm",
        "train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def values(run: Path, kind: str, *names: str) -> list[list[Any]]:
    return [[r[name] for name in names] for r in read_journal(run / "log.jsonl") if r["kind"] == kind]


def test_two_processes_give_the_losses_of_one_and_go_on_exactly(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data")
    plain = {"dropout": 0.0}
    one = tiny_config(data, model=plain, training={"batch_size": 8})
    start_run(one, tmp_path / "one", display=quiet())

    two = tiny_config(data, model=plain, training={"batch_size": 4})
    (tmp_path / "two.toml").write_text(config_to_toml(two))
    torchrun("--config", tmp_path / "two.toml", "--out", tmp_path / "two")
    for kind, names in (("step", ("step", "loss", "grad_norm", "lr", "tokens")), ("eval", ("step", "val_loss"))):
        expected = values(tmp_path / "one", kind, *names)
        got = values(tmp_path / "two", kind, *names)
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)

    # With dropout: what follows the checkpoint of step 6 comes out the same again.
    (tmp_path / "whole.toml").write_text(config_to_toml(tiny_config(data)))
    torchrun("--config", tmp_path / "whole.toml", "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    for checkpoint in find_checkpoints(tmp_path / "halves" / "checkpoints"):
        if checkpoint.step > 6:
            shutil.rmtree(checkpoint.path)
    torchrun("--resume", tmp_path / "halves")
    assert [r["step"] for r in read_journal(tmp_path / "halves" / "log.jsonl") if r["kind"] == "resume"] == [6]
    names = ("step", "loss", "grad_norm")
    assert values(tmp_path / "halves", "step", *names) == values(tmp_path / "whole", "step", *names)
    weights = [choose_checkpoint(tmp_path / r, "last").model_path / "model.safetensors" for r in ("whole", "halves")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
