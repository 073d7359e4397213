"""Several processes: their loss curve is that of one process with the same global batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.models.gpt import GPT
from fastlm.tasks import finetune
from fastlm.training import choose_checkpoint, resume_run, start_run
from fastlm.training.checkpoint import find_checkpoints
from fastlm.training.config import config_from_dict, config_to_toml
from fastlm.training.journal import read_journal
from fastlm.training.sharding import ON_CPU
from tests.test_tasks import save_model, write_examples
from tests.training_runs import one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


# Every run of the test in one launch, for the imports of two processes take longer than all of them together.
DRIVER = """
import sys
from pathlib import Path
import torch.distributed as dist
from fastlm.tasks import finetune
from fastlm.training import load_config, resume_run, start_run
from fastlm.training.sharding import ON_CPU
from tests.training_runs import quiet

dist.init_process_group("gloo")  # one for all runs
folder = Path(sys.argv[1])
for kind in ("", "sharded_") if ON_CPU else ("",):
    for name in (kind.strip("_") or "two", f"{kind}whole", f"{kind}halves"):
        start_run(load_config(folder / f"{name}.toml"), folder / name, display=quiet())
    finetune(load_config(folder / f"{kind}tuned.toml"), folder / f"{kind}tuned", display=quiet())
    resume_run(folder / f"{kind}halves", overrides=("training.steps=12",), display=quiet())
dist.destroy_process_group()
"""


sharding = pytest.mark.skipif(not ON_CPU, reason=f"torch {torch.__version__} cannot shard a model on a CPU")


def torchrun(script: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def values(run: Path, kind: str, *names: str) -> list[list[Any]]:
    return [[r[name] for name in names] for r in read_journal(run / "log.jsonl") if r["kind"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, DDP and FSDP2: plain, with dropout, and with dropout in two halves."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_tiny_dataset(folder / "data")
    plain = {"dropout": 0.0}
    constant = {"schedule": "constant"}
    sharded = {"parallel": "fsdp"}
    sampling = {"sample_every": 5, "sample_tokens": 3, "windows": 7}  # 7: the processes have unequal parts
    configs = {
        "two": tiny_config(data, model=plain, training={"batch_size": 4}),
        "whole": tiny_config(data, training=constant),
        "halves": tiny_config(data, training={**constant, "steps": 6}),
        "sharded": tiny_config(data, model=plain, training={"batch_size": 4, **sharded}),
        "sharded_whole": tiny_config(data, training={**constant, **sharded}, evaluation=sampling),
        "sharded_halves": tiny_config(data, training={**constant, **sharded, "steps": 6}, evaluation=sampling),
    }
    task = {"name": "classification", "model": str(save_model(folder / "masked", "masked")), "dropout": 0.0,
            "train": str(write_examples(folder / "x.tsv", 40)), "head_dropout": 0.0,
            "class_weights": "1.0,7.0"}  # fmt: skip
    for name, parallel in (("tuned", "ddp"), ("sharded_tuned", "fsdp")):
        training = {"steps": 4, "batch_size": 4, "device": "cpu", "parallel": parallel}
        configs[name] = config_from_dict({"task": task, "lora": {"rank": 2}, "training": training})
    alone = {**training, "batch_size": 8, "parallel": "ddp"}
    configs["alone_tuned"] = config_from_dict({"task": task, "lora": {"rank": 2}, "training": alone})
    for name, config in configs.items():
        (folder / f"{name}.toml").write_text(config_to_toml(config))
    (folder / "driver.py").write_text(DRIVER)
    torchrun(folder / "driver.py", folder)
    start_run(tiny_config(data, model=plain, training={"batch_size": 8}), folder / "one", display=quiet())
    finetune(configs["alone_tuned"], folder / "alone_tuned", display=quiet())
    return folder


@pytest.mark.parametrize("name", ["two", pytest.param("sharded", marks=sharding)])
def test_two_processes_give_the_losses_of_one(folder: Path, name: str) -> None:
    for kind, names in (("step", ("step", "loss", "grad_norm", "lr", "tokens")), ("eval", ("step", "val_loss"))):
        expected = values(folder / "one", kind, *names)
        got = values(folder / name, kind, *names)
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("kind", ["", pytest.param("sharded_", marks=sharding)])
def test_two_processes_go_on_exactly(folder: Path, kind: str) -> None:
    """With dropout, which each process draws for itself: six steps and six more are twelve."""
    halves, whole = folder / f"{kind}halves", folder / f"{kind}whole"
    assert values(halves, "resume", "step", "processes") == [[6, 2]]
    names = ("step", "loss", "grad_norm")
    assert values(halves, "step", *names) == values(whole, "step", *names)
    assert values(halves, "sample", "step", "text") == values(whole, "sample", "step", "text")
    weights = [choose_checkpoint(run, "last").model_path / "model.safetensors" for run in (whole, halves)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@sharding
def test_a_sharded_run_is_the_files_of_one_process_and_goes_on_in_one(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "sharded", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    last = choose_checkpoint(run, "last")
    alone = next(c for c in find_checkpoints(folder / "one" / "checkpoints") if c.step == last.step)
    ours, theirs = GPT.from_pretrained(last.model_path), GPT.from_pretrained(alone.model_path)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.shape == b.shape, name
        if a.dim() >= 2:  # a bias of the keys has no gradient: what Adam makes of its rounding is chance
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3, msg=name)
    states = [c.load_state()["optimizer"]["state"] for c in (last, alone)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][i]["exp_avg"].shape == states[1][i]["exp_avg"].shape for i in states[0])

    resume_run(run, overrides=("training.batch_size=8",), display=quiet())  # the same global batch
    got, expected = (values(r, "step", "step", "loss") for r in (run, folder / "one"))
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("name", ["tuned", pytest.param("sharded_tuned", marks=sharding)])
def test_a_classifier_with_adapters_gives_the_losses_of_one_process(folder: Path, name: str) -> None:
    """A model that generates no text, most of it frozen; the processes' batches count by their class weights."""
    expected, got = (values(folder / run, "step", "loss", "grad_norm") for run in ("alone_tuned", name))
    assert len(expected) == 4
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_sharding_is_chosen_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.parallel must be one of ddp, fsdp, got 'zero3'"):
        tiny_config(tmp_path, training={"parallel": "zero3"})
    data = write_tiny_dataset(tmp_path / "data")
    config = tiny_config(data, training={"parallel": "fsdp", "steps": 2})  # one process has nothing to share out
    assert start_run(config, tmp_path / "run", display=quiet()).reason == "done"
