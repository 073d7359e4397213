"""A fine-tuning run that stopped goes on exactly, and a finished one that was killed gets its metrics."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import fastlm
from fastlm.cli import app
from fastlm.tasks import classification
from fastlm.tasks.registry import DEFAULTS, finetune, resume
from fastlm.training import choose_checkpoint, resume_run
from fastlm.training.config import load_config
from fastlm.training.journal import read_journal
from fastlm.training.progress import PlainDisplay
from fastlm.training.trainer import Trainer
from tests.test_tasks import LETTERS, save_model, write_examples
from tests.training_runs import SENTENCE, one_thread, quiet  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ("training.steps=7", "training.batch_size=4", "training.grad_accum=2", "training.lr=1e-2",
          "training.warmup_steps=2", "training.device=cpu", "evaluation.every=4", "checkpoint.every=2")  # fmt: skip


class Killed(Exception):
    """Stands for kill -9: what is on the disk is what there was at that moment."""


def save_llama(folder: Path) -> Path:
    """Its projections of queries, keys and values are three in a folder of adapters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 24, "dropout": 0.1}
    config = fastlm.GPTConfig(
        vocab_size=29, norm="rms_norm", position="rotary", activation="swiglu", bias=False, **sizes
    )
    fastlm.GPT(config).save_pretrained(folder, format="fastlm")
    LETTERS.save(folder)
    return folder


def settings_of(kind: str, folder: Path) -> list[str]:
    (folder / "pairs.tsv").write_text("".join(f"the fox {w}\tle {w}\n" for w in SENTENCE.split() * 3))
    (folder / "text.txt").write_text(SENTENCE * 40)
    lora = ["lora.rank=2", "lora.targets=attention"]
    return {
        "classification": ["task.name=classification", f"task.train={write_examples(folder / 'x.tsv', 60)}",
                           f"task.model={save_model(folder / 'masked', 'masked')}", "task.dropout=0.1",
                           "task.class_weights=balanced", "task.test_fraction=0.2"],
        "classification with LoRA": ["task.name=classification", f"task.train={write_examples(folder / 'x.tsv', 60)}",
                                     f"task.model={save_llama(folder / 'llama')}", *lora],
        "text with LoRA": ["task.name=text", f"task.train={folder / 'text.txt'}",
                           f"task.model={save_llama(folder / 'llama')}", *lora],
        "translation": ["task.name=translation", "task.model=new", f"task.train={folder / 'pairs.tsv'}",
                        f"task.val={folder / 'pairs.tsv'}", "task.architecture=encoder-decoder",
                        "task.vocab_size=300", "task.max_new_tokens=3", "model.n_layer=1", "model.n_head=2",
                        "model.n_embd=16", "model.block_size=32", "model.dropout=0.1"],
    }[kind]  # fmt: skip


def numbers(run: Path) -> list[dict[str, Any]]:
    records = read_journal(run / "log.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records if r["kind"] in ("step", "eval")]


def contents(file: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, list[int], bytes]]]:
    """Metadata and tensors to the bit: safetensors writes the keys of the metadata in any order."""
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return opened.metadata(), {
            key: (t.dtype, list(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
            for key, t in tensors.items()
        }


def assert_same(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole) and len(numbers(run)) == 9
    last, expected = choose_checkpoint(run, "last"), choose_checkpoint(whole, "last")
    for file in expected.model_path.rglob("*.safetensors"):
        assert contents(last.model_path / file.relative_to(expected.model_path)) == contents(file), file
    torch.testing.assert_close(last.load_state()["optimizer"], expected.load_state()["optimizer"], rtol=0, atol=0)
    assert json.loads((run / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())


@pytest.mark.parametrize("kind", ["classification", "classification with LoRA", "text with LoRA", "translation"])
def test_a_killed_run_goes_on_exactly(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*COMMON, *settings_of(kind, tmp_path)]
    finetune(load_config(None, overrides, DEFAULTS), tmp_path / "whole", display=quiet())
    report = Trainer._report_step

    def die_after_step_five(self: Trainer, *args: Any) -> None:
        report(self, *args)
        if self.step == 5:
            self.writer.wait()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_report_step", die_after_step_five)
        finetune(load_config(None, overrides, DEFAULTS), tmp_path / "run", display=quiet())
    assert choose_checkpoint(tmp_path / "run", "last").step == 4
    result, _ = resume(tmp_path / "run", display=quiet())
    assert (result.reason, result.step) == ("done", 7)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_signal_stops_it_before_the_metrics_and_the_command_goes_on(tmp_path: Path) -> None:
    class Interrupter(PlainDisplay):
        def step(self, step: int, loss: float, tokens: int) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    overrides = [*COMMON, *settings_of("classification", tmp_path)]
    finetune(load_config(None, overrides, DEFAULTS), tmp_path / "whole", display=quiet())
    run = tmp_path / "run"
    result, metrics = finetune(load_config(None, overrides, DEFAULTS), run, display=Interrupter(quiet().console))
    assert (result.reason, result.step, metrics) == ("SIGTERM", 3, {})
    assert not (run / "metrics.json").exists()
    out = CliRunner().invoke(app, ["finetune", "--resume", str(run)])
    assert out.exit_code == 0 and "accuracy" in out.output, out.output
    assert_same(run, tmp_path / "whole")


def test_a_run_killed_while_it_is_evaluated_gets_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*COMMON, *settings_of("classification", tmp_path)]

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(classification, "evaluate", die)
        finetune(load_config(None, overrides, DEFAULTS), tmp_path / "run", display=quiet())
    result, metrics = resume(tmp_path / "run", display=quiet())
    assert (result.reason, result.step) == ("done", 7) and metrics["examples"] == 12
    with pytest.raises(ValueError, match="is done: its checkpoint is of step 7 of 7"):
        resume(tmp_path / "run", display=quiet())
    (tmp_path / "run" / "metrics.json").unlink()
    overrides = ("training.steps=50", "training.lr=1e-12", "evaluation.patience=3", "evaluation.every=1")
    result, _ = resume(tmp_path / "run", overrides=overrides, display=quiet())
    assert result.reason == "early stop" and (tmp_path / "run" / "metrics.json").is_file()
    (tmp_path / "run" / "metrics.json").unlink()
    again, metrics = resume(tmp_path / "run", display=quiet())
    assert (again.reason, again.step) == ("early stop", result.step) and metrics["examples"] == 12


def test_steps_in_the_command_count_and_not_the_epochs_of_the_file(tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "config.toml"
    config.write_text("[task]\nepochs = 1.0\n")
    settings = [*COMMON[1:], *settings_of("classification", tmp_path)]  # 43 examples are 6 steps of 8

    def command(*arguments: object) -> tuple[str, int]:
        result = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
        return result.output, choose_checkpoint(run, "last").step

    new = [tmp_path / "masked", "--out", run, "--config", config, *(x for s in settings for x in ("--set", s))]
    assert command(*new, "--set", "training.steps=2")[1] == 2
    assert command("--resume", run, "--set", "training.steps=3")[1] == 3
    assert command("--resume", run, "--set", "task.epochs=1")[1] == 6
    assert command("--resume", run, "--set", "training.steps=7")[1] == 7
    output, _ = command("--resume", run, "--set", "training.steps=9", "--set", "task.epochs=3")
    assert "wanted training.steps or task.epochs, got both: 9 and 3" in output


def test_a_run_goes_on_from_any_directory_and_says_where_its_files_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*COMMON, *(s.replace(f"{tmp_path}/", "") for s in settings_of("classification", tmp_path))]
    assert "task.train=x.tsv" in overrides and "task.model=masked" in overrides
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    finetune(load_config(None, [*overrides, "training.steps=1"], DEFAULTS), "run", display=quiet())
    monkeypatch.chdir("elsewhere")
    assert resume("../run", overrides=("training.steps=2",), display=quiet())[0].step == 2
    (tmp_path / "x.tsv").rename("moved.tsv")
    more = "training.steps=3"
    with pytest.raises(FileNotFoundError, match=rf"nothing at {tmp_path / 'x.tsv'}: .* --set task.train=PATH$"):
        resume("../run", overrides=(more,), display=quiet())
    assert resume("../run", overrides=(more, "task.train=moved.tsv"), display=quiet())[0].step == 3


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    run, train = tmp_path / "run", tmp_path / "x.tsv"
    overrides = [*COMMON, *settings_of("classification", tmp_path), "task.class_weights=none"]
    finetune(load_config(None, overrides, DEFAULTS), run, display=quiet())
    more = "training.steps=9"
    for override, message in (
        ("lora.rank=2", "adapters of rank 0 and alpha 0, the settings ask for rank 2"),
        ("task.pooling=first", "another head than the settings"),
        ("task.split_seed=3", "the saved data position has digest"),
    ):
        with pytest.raises(ValueError, match=message):
            resume(run, overrides=(more, override), display=quiet())
    with pytest.raises(ValueError, match="fastlm finetune --resume"):
        resume_run(run)
    adapted = tmp_path / "adapted"
    finetune(load_config(None, [*overrides, "lora.rank=2"], DEFAULTS), adapted, display=quiet())
    with pytest.raises(ValueError, match="beside other projections than 'all' names"):
        resume(adapted, overrides=(more, "lora.targets=all"), display=quiet())
    shutil.copy(train, tmp_path / "kept.tsv")
    write_examples(train, 60, seed=5)
    with pytest.raises(ValueError, match="the saved data position has digest"):
        resume(run, overrides=(more,), display=quiet())
    shutil.copy(tmp_path / "kept.tsv", train)
    assert choose_checkpoint(run, "last").step == 7
    assert resume(run, overrides=(more,), display=quiet())[0].step == 9
    out = CliRunner().invoke(app, ["finetune", str(tmp_path / "masked"), "--resume", str(run)])
    assert out.exit_code == 2 and "for a new run" in out.output
    out = CliRunner().invoke(app, ["finetune", str(tmp_path / "masked")])
    assert out.exit_code == 2 and "give MODEL and" in out.output
