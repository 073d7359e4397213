"""Resuming is exact: a run that was killed gives, bit for bit, the losses and weights of one that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.training import choose_checkpoint, resume_run, start_run
from fastlm.training.checkpoint import find_checkpoints
from fastlm.training.config import config_to_toml
from fastlm.training.journal import read_journal
from fastlm.training.progress import PlainDisplay
from fastlm.training.run import run_config
from tests.training_runs import one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

# Runs `fastlm train`, and kills its own process at a moment that the test chooses.
DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
from fastlm.models.gpt import GPT
from fastlm.training import Trainer, load_config, start_run

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

moment, step = sys.argv[4], int(sys.argv[5])
if moment == "after a step":
    report = Trainer._report_step
    def after_step(self, *args):
        report(self, *args)
        if self.step == step:
            self.writer.wait()
            die()
    Trainer._report_step = after_step
else:
    save = GPT.save_pretrained
    def in_save(self, path, **options):
        save(self, path, **options)
        if f"{step:08d}" in str(path):
            die()
    GPT.save_pretrained = in_save
start_run(load_config(Path(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def whole(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run that was never stopped; its dataset lies beside it."""
    folder = tmp_path_factory.mktemp("whole")
    start_run(tiny_config(write_tiny_dataset(folder / "data")), folder / "run", display=quiet())
    return folder


def numbers(run: Path) -> list[dict[str, Any]]:
    """All that a log says of the training itself, without times."""
    kinds = ("step", "eval", "sample")
    return [
        {k: v for k, v in record.items() if k not in ("tokens_per_second", "mfu")}
        for record in read_journal(run / "log.jsonl")
        if record["kind"] in kinds
    ]


def assert_same_run(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole / "run")
    last, expected = choose_checkpoint(run, "last"), choose_checkpoint(whole / "run", "last")
    assert last.step == expected.step == 12
    weights = (last.model_path / "model.safetensors").read_bytes()
    assert weights == (expected.model_path / "model.safetensors").read_bytes()
    state, other = last.load_state(), expected.load_state()
    torch.testing.assert_close(state["optimizer"], other["optimizer"], rtol=0, atol=0)
    assert torch.equal(state["rng"][0]["torch"], other["rng"][0]["torch"])
    assert state["data"] == other["data"]


@pytest.mark.parametrize(("moment", "step", "left"), [("after a step", 5, 4), ("while saving", 6, 4)])
def test_a_killed_run_goes_on_exactly(whole: Path, tmp_path: Path, moment: str, step: int, left: int) -> None:
    (tmp_path / "config.toml").write_text(config_to_toml(tiny_config(whole / "data")))
    run = tmp_path / "run"
    arguments = [str(tmp_path / "config.toml"), str(run), str(torch.get_num_threads()), moment, str(step)]
    killed = subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = find_checkpoints(run / "checkpoints")
    assert checkpoints[-1].step == left
    if moment == "while saving":
        assert list((run / "checkpoints").glob(".tmp-*"))
    with (run / "log.jsonl").open("a") as f:
        f.write('{"kind": "step", "st')  # a line that the crash cut off
    resume_run(run, display=quiet())
    assert_same_run(run, whole)
    assert not list((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_exactly(
    whole: Path, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Interrupter(PlainDisplay):
        def step(self, step: int, loss: float, tokens: int) -> None:
            if step == 7:
                os.kill(os.getpid(), number)
                said.append(capfd.readouterr().err)

    said: list[str] = []
    before = signal.getsignal(number)
    result = start_run(tiny_config(whole / "data"), tmp_path / "run", display=Interrupter(quiet().console))
    assert (result.reason, result.step) == (number.name, 7)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    what = f"{name}: the run stops and saves after this step; a second {name} quits now, without saving"
    assert said == [f"\n{what}\n"]
    assert signal.getsignal(number) is before
    assert choose_checkpoint(tmp_path / "run", "last").step == 7
    resume_run(tmp_path / "run", display=quiet())
    assert_same_run(tmp_path / "run", whole)


def test_samples_and_evaluations_do_not_change_the_training(whole: Path, tmp_path: Path) -> None:
    config = tiny_config(
        whole / "data", evaluation={"every": 1, "sample_every": 2, "sample_tokens": 5, "prompt": "the "}
    )
    start_run(config, tmp_path / "run", display=quiet())
    losses = [[r["loss"] for r in numbers(run) if r["kind"] == "step"] for run in (tmp_path / "run", whole / "run")]
    assert losses[0] == losses[1]
    samples = [r["text"] for r in numbers(tmp_path / "run") if r["kind"] == "sample"]
    assert len(samples) == 6
    assert all(text.startswith("the ") for text in samples)


def test_a_run_goes_on_from_any_directory_and_says_where_its_data_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_dataset(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    start_run(tiny_config(Path("data"), training={"steps": 1}), "run", display=quiet())
    monkeypatch.chdir("elsewhere")
    resume_run("../run", overrides=("training.steps=2",), display=quiet())
    (tmp_path / "data").rename("moved")
    more = "training.steps=3"
    with pytest.raises(FileNotFoundError, match=rf"nothing at {tmp_path / 'data'}: .* --set data.path=PATH or --data"):
        resume_run("../run", overrides=(more,), display=quiet())
    assert resume_run("../run", overrides=(more, "data.path=moved"), display=quiet()).step == 3
    assert run_config("../run").data.path == str(tmp_path / "elsewhere" / "moved")


def test_a_longer_run_goes_on_from_a_finished_one(whole: Path, tmp_path: Path) -> None:
    settings = {"schedule": "constant"}
    short = tiny_config(whole / "data", training={**settings, "steps": 4})
    start_run(short, tmp_path / "run", display=quiet())
    with pytest.raises(ValueError, match=r"is done: its checkpoint is of step 4 of 4"):
        resume_run(tmp_path / "run", display=quiet())
    resume_run(tmp_path / "run", overrides=("training.steps=12",), display=quiet())
    start_run(tiny_config(whole / "data", training=settings), tmp_path / "long", display=quiet())
    steps = [[r for r in numbers(tmp_path / run) if r["kind"] == "step"] for run in ("run", "long")]
    assert steps[0] == steps[1]


def test_a_run_goes_on_with_other_settings_of_the_optimizer(whole: Path, tmp_path: Path) -> None:
    short = tiny_config(whole / "data", training={"steps": 4})
    start_run(short, tmp_path / "run", display=quiet())
    changed = ("training.steps=5", "optimizer.beta1=0.5", "optimizer.eps=0.1", "optimizer.weight_decay=0.3")
    resume_run(tmp_path / "run", overrides=changed, display=quiet())
    groups = choose_checkpoint(tmp_path / "run", "last").load_state()["optimizer"]["param_groups"]
    assert [(g["betas"][0], g["eps"], g["weight_decay"]) for g in groups] == [(0.5, 0.1, 0.3), (0.5, 0.1, 0.0)]


def test_settings_that_pretraining_has_no_use_for(whole: Path, tmp_path: Path) -> None:
    for change, section in (({"lora": {"rank": 2}}, "lora"), ({"task": {"name": "classification"}}, "task")):
        config = tiny_config(whole / "data", **change)
        with pytest.raises(ValueError, match=rf"\[{section}\] has no meaning in pretraining"):
            start_run(config, tmp_path / "run", display=quiet())
    config = tiny_config(whole / "data", evaluation={"sample_every": 2, "prompt": "中"})
    with pytest.raises(ValueError, match=r"evaluation.prompt: character '中'"):
        start_run(config, tmp_path / "run", display=quiet())
    config = tiny_config(write_tiny_dataset(tmp_path / "alone", val=False), evaluation={"patience": 1})
    with pytest.raises(ValueError, match=r"evaluation.patience=1 needs a validation split, and the data have none"):
        start_run(config, tmp_path / "run", display=quiet())
    with pytest.raises(ValueError, match="device must be auto, cpu, or cuda"):
        start_run(tiny_config(whole / "data", training={"device": "meta"}), tmp_path / "other", display=quiet())


def test_what_cannot_be_resumed_says_why(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run: it has no config\.toml"):
        resume_run(tmp_path)
    (tmp_path / "config.toml").write_text(config_to_toml(tiny_config(whole / "data")))
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        resume_run(tmp_path)


def test_other_data_or_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start_run(tiny_config(whole / "data", training={"steps": 3}), run, display=quiet())
    more = "training.steps=6"
    write_tiny_dataset(tmp_path / "other", val=False)
    with pytest.raises(ValueError, match="another model"):
        resume_run(run, overrides=(more, "model.n_head=1"), display=quiet())
    with pytest.raises(ValueError, match="the saved data position has seed=0"):
        resume_run(run, overrides=(more, "training.seed=1"), display=quiet())
    assert choose_checkpoint(run, "last").step == 3
