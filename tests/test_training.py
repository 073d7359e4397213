"""The training loop: what it learns, logs, keeps and refuses; optimizer groups; checkpoints that no crash damages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlm
from fastlm.data import load_tokenizer
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.training import checkpoint, choose_checkpoint, resume_run, start_run
from fastlm.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    copied,
    find_checkpoint,
    find_checkpoints,
    open_checkpoint,
    rng_state,
    set_rng_state,
)
from fastlm.training.journal import Journal, read_journal
from fastlm.training.loading import load_found
from fastlm.training.optimizer import make_optimizer, parameter_groups
from fastlm.training.progress import PlainDisplay
from fastlm.training.run import RunDoneError
from fastlm.training.trainer import NonFiniteLossError, Trainer, resolve_device, resolve_precision
from tests.training_runs import file_size_limit, one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_tiny_dataset(tmp_path / "data")


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_journal(run / "log.jsonl") if r["kind"] == kind]


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=28, block_size=16, n_layer=1, n_head=2, n_embd=8))


class TestARun:
    def test_it_learns_and_leaves_everything_behind(self, dataset: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        config = tiny_config(dataset, training={"steps": 60, "batch_size": 8, "grad_accum": 1, "lr": 2e-2})
        result = start_run(config, run, display=quiet())
        steps, evaluations = records(run, "step"), records(run, "eval")
        assert result.reason == "done"
        assert [r["step"] for r in steps] == list(range(1, 61))
        assert steps[0]["loss"] == pytest.approx(3.33, abs=0.1)  # ln 29: nothing is known yet
        assert evaluations[-1]["val_loss"] < 0.6 * steps[0]["loss"]
        assert evaluations[-1]["step"] == 60
        assert result.val_loss == evaluations[-1]["val_loss"]
        assert result.best_val_loss == min(e["val_loss"] for e in evaluations)
        assert {p.name for p in run.iterdir()} == {"config.toml", "tokenizer", "log.jsonl", "checkpoints", "loss.png"}
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert {"lr", "grad_norm", "tokens", "tokens_per_second", "mfu"} <= set(steps[0])
        assert steps[0]["mfu"] is None  # the CPU is in no table
        start = records(run, "start")[0]
        assert start["peak_flops"] == "unknown"
        assert start["fastlm"] == fastlm.__version__

    def test_the_checkpoint_is_the_model(self, dataset: Path, tmp_path: Path) -> None:
        start_run(tiny_config(dataset), tmp_path / "run", display=quiet())
        checkpoint = choose_checkpoint(tmp_path / "run", "last")
        model = GPT.from_pretrained(checkpoint.model_path).eval()
        tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
        assert model.config.vocab_size == tokenizer.vocab_size
        assert checkpoint.val_loss == records(tmp_path / "run", "eval")[-1]["val_loss"]

    def test_accumulation_is_the_larger_batch(self, dataset: Path, tmp_path: Path) -> None:
        logs = []
        for batch, accumulation in ((8, 1), (2, 4)):
            run = tmp_path / f"run{batch}"
            config = tiny_config(
                dataset, model={"dropout": 0.0}, training={"steps": 5, "batch_size": batch, "grad_accum": accumulation}
            )
            start_run(config, run, display=quiet())
            logs.append([(r["loss"], r["grad_norm"]) for r in records(run, "step")])
        torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-4, atol=1e-5)

    def test_gradient_checkpointing_changes_no_loss(self, dataset: Path, tmp_path: Path) -> None:
        losses = []
        for on in (False, True):
            config = tiny_config(dataset, model={"dropout": 0.0}, training={"steps": 3, "gradient_checkpointing": on})
            start_run(config, tmp_path / str(on), display=quiet())
            losses.append([r["loss"] for r in records(tmp_path / str(on), "step")])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_compiled_it_trains_the_same(self, dataset: Path, tmp_path: Path) -> None:
        losses = []
        for on in (False, True):
            config = tiny_config(
                dataset,
                model={"dropout": 0.0, "n_layer": 1},
                training={"steps": 3, "compile": on},
                evaluation={"sample_every": 2, "sample_tokens": 2},
            )
            start_run(config, tmp_path / str(on), display=quiet())
            losses.append([r["loss"] for r in records(tmp_path / str(on), "step")])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        names = [
            GPT.from_pretrained(choose_checkpoint(tmp_path / r).model_path).state_dict().keys()
            for r in ("True", "False")
        ]
        assert names[0] == names[1]  # no prefix of the compiler's

    def test_bf16_trains(self, dataset: Path, tmp_path: Path) -> None:
        config = tiny_config(dataset, training={"precision": "bf16", "steps": 12, "lr": 2e-2})
        start_run(config, tmp_path / "run", display=quiet())
        losses = [r["loss"] for r in records(tmp_path / "run", "step")]
        assert losses[-1] < losses[0] - 0.2
        weights = GPT.from_pretrained(choose_checkpoint(tmp_path / "run").model_path).state_dict()
        assert {w.dtype for w in weights.values()} == {torch.float32}

    def test_early_stop_and_the_best_checkpoint(self, dataset: Path, tmp_path: Path) -> None:
        config = tiny_config(
            dataset,
            training={"lr": 1.0, "schedule": "constant", "steps": 40, "warmup_steps": 0},  # far too high: it gets worse
            evaluation={"every": 1, "patience": 3},
            checkpoint={"every": 0, "keep_last": 1},
        )
        result = start_run(config, tmp_path / "run", display=quiet())
        evaluations = records(tmp_path / "run", "eval")
        best = min(evaluations, key=lambda e: e["val_loss"])
        assert result.reason == "early stop"
        assert result.step == best["step"] + 3 < 40
        kept = [c.step for c in find_checkpoints(tmp_path / "run" / "checkpoints")]
        assert kept == [best["step"], result.step]
        assert choose_checkpoint(tmp_path / "run", "best").step == best["step"]
        assert choose_checkpoint(tmp_path / "run", "last").step == result.step

    def test_an_early_stop_is_the_end_when_the_run_is_resumed(self, dataset: Path, tmp_path: Path) -> None:
        """And so it is where a signal came in the very step whose evaluation ended the patience."""

        class Interrupter(PlainDisplay):
            def evaluation(self, step: int, loss: float, bits: float | None) -> None:
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

        never_better = {"lr": 1e-12, "schedule": "constant", "warmup_steps": 0}
        config = tiny_config(dataset, training=never_better, evaluation={"every": 1, "patience": 2})
        for display, reason in ((quiet(), "early stop"), (Interrupter(quiet().console), "SIGTERM")):
            run = tmp_path / reason
            result = start_run(config, run, display=display)
            assert (result.reason, result.step) == (reason, 3)
            before = (run / "log.jsonl").read_bytes()
            with pytest.raises(
                RunDoneError, match=r"ended early at step 3, after 2 evaluations .*higher than 2, or to 0"
            ):
                resume_run(run, overrides=("training.steps=20",), display=quiet())
            assert (run / "log.jsonl").read_bytes() == before
        result = resume_run(run, overrides=("evaluation.patience=4",), display=quiet())
        assert (result.reason, result.step) == ("early stop", 5)

    def test_a_run_out_of_time_saves_and_can_go_on(self, dataset: Path, tmp_path: Path) -> None:
        config = tiny_config(dataset, training={"max_minutes": 1e-9})
        result = start_run(config, tmp_path / "run", display=quiet())
        assert (result.reason, result.step) == ("out of time", 1)
        assert choose_checkpoint(tmp_path / "run", "last").step == 1
        assert resume_run(tmp_path / "run", overrides=("training.max_minutes=0",), display=quiet()).reason == "done"

    def test_without_validation(self, tmp_path: Path) -> None:
        data = write_tiny_dataset(tmp_path / "data", val=False)
        result = start_run(tiny_config(data, training={"steps": 3}), tmp_path / "run", display=quiet())
        assert result.val_loss is None
        assert records(tmp_path / "run", "eval") == []
        assert choose_checkpoint(tmp_path / "run", "best").step == 3

    def test_a_run_is_never_overwritten(self, dataset: Path, tmp_path: Path) -> None:
        start_run(tiny_config(dataset, training={"steps": 1}), tmp_path / "run", display=quiet())
        before = (tmp_path / "run" / "log.jsonl").read_bytes()
        with pytest.raises(FileExistsError, match="has a run already"):
            start_run(tiny_config(dataset), tmp_path / "run", display=quiet())
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
        with pytest.raises(FileExistsError, match="is not empty"):
            start_run(tiny_config(dataset), tmp_path, display=quiet())

    def test_nothing_is_written_for_a_run_that_cannot_start(self, dataset: Path, tmp_path: Path) -> None:
        for sections, message in (
            ({"data": {"path": ""}}, r"data\.path is missing"),
            ({"data": {"path": str(tmp_path / "no")}}, "not a fastlm dataset"),
            ({"model": {"block_size": 5000}}, "the text is too short"),
            ({"model": {"block_size": 900}}, "validation split of .*: the text is too short"),
            ({"model": {"vocab_size": 5}}, "smaller than the tokenizer's vocabulary of 29"),
            ({"model": {"n_head": 3}}, "n_embd"),
            ({"training": {"device": "cuda:99"}}, "device 'cuda:99' was asked for"),
            ({"logging": {"trackio": True}}, "logging.trackio needs the package trackio"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                start_run(tiny_config(dataset, **sections), tmp_path / "run", display=quiet())
            assert not (tmp_path / "run").exists()

    def test_nan_stops_with_the_place_and_spoils_no_weight(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = Trainer._train_step

        def poisoned(self: Trainer) -> int:
            if self.step == 4:
                forward = self.forward
                self.forward = lambda *batch: (None, forward(*batch)[1] * float("nan"))
            return step(self)

        monkeypatch.setattr(Trainer, "_train_step", poisoned)
        with pytest.raises(
            NonFiniteLossError, match=r"step 5: loss nan.*position 32 .*checkpoint before it is of step 4"
        ):
            start_run(tiny_config(dataset), tmp_path / "run", display=quiet())
        kept = choose_checkpoint(tmp_path / "run", "last")
        assert kept.step == 4
        weights = GPT.from_pretrained(kept.model_path).state_dict()
        assert all(w.isfinite().all() for w in weights.values())


class TestOptimizer:
    def test_matrices_are_decayed_and_vectors_are_not(self) -> None:
        model = tiny_model()
        decayed, plain = parameter_groups(model, 0.1)
        assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
        assert all(p.dim() >= 2 for p in decayed["params"])
        assert all(p.dim() < 2 for p in plain["params"])
        assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))

    def test_frozen_parameters_are_left_out(self) -> None:
        model = tiny_model()
        model.wte.weight.requires_grad_(False)
        groups = make_optimizer(model, tiny_config(Path("x")).optimizer, 1e-3).param_groups
        assert not any(p is model.wte.weight for g in groups for p in g["params"])

    def test_it_steps_as_torchs_adamw(self) -> None:
        ours, theirs = tiny_model(), tiny_model()
        settings = tiny_config(Path("x")).optimizer
        first = make_optimizer(ours, settings, 1e-2)
        second = torch.optim.AdamW(
            parameter_groups(theirs, settings.weight_decay), lr=1e-2, betas=(settings.beta1, settings.beta2)
        )
        idx = torch.randint(0, 28, (2, 17), generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            for model, optimizer in ((ours, first), (theirs, second)):
                optimizer.zero_grad()
                model(idx[:, :-1], idx[:, 1:])[1].backward()
                optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestCheckpoints:
    def save(self, folder: Path, steps: dict[int, float | None], **options: Any) -> CheckpointWriter:
        writer = CheckpointWriter(folder, **options)
        for step, val_loss in steps.items():
            writer.save(tiny_model(), {"step": step, "tensor": torch.full((3,), float(step))}, step, val_loss)
        writer.wait()
        return writer

    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        self.save(tmp_path, {7: 1.5})
        (checkpoint,) = find_checkpoints(tmp_path)
        assert (checkpoint.step, checkpoint.val_loss) == (7, 1.5)
        assert checkpoint.load_state()["tensor"].tolist() == [7, 7, 7]
        loaded = GPT.from_pretrained(checkpoint.model_path).state_dict()
        for name, weight in tiny_model().state_dict().items():
            assert torch.equal(loaded[name], weight)

    def test_the_copy_is_of_the_moment_of_saving(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import threading

        begin = threading.Event()
        write = CheckpointWriter._write

        def late(self: CheckpointWriter, *arguments: Any) -> None:
            begin.wait(60)
            write(self, *arguments)

        monkeypatch.setattr(CheckpointWriter, "_write", late)
        model, writer = tiny_model(), CheckpointWriter(tmp_path)
        state = {"moment": torch.ones(2), "nested": [{"t": torch.ones(1)}]}
        writer.save(model, state, 1, None)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        state["moment"].zero_()
        state["nested"][0]["t"].zero_()
        begin.set()
        writer.wait()
        (checkpoint,) = find_checkpoints(tmp_path)
        assert checkpoint.load_state()["moment"].tolist() == [1, 1]
        assert checkpoint.load_state()["nested"][0]["t"].tolist() == [1]
        assert GPT.from_pretrained(checkpoint.model_path).wte.weight.abs().sum() > 0

    def test_the_last_and_the_best_are_kept(self, tmp_path: Path) -> None:
        losses: dict[int, float | None] = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
        self.save(tmp_path / "a", losses, keep_last=2)
        assert [c.step for c in find_checkpoints(tmp_path / "a")] == [2, 4, 5]
        self.save(tmp_path / "b", losses, keep_last=1, keep_best=False)
        assert [c.step for c in find_checkpoints(tmp_path / "b")] == [5]

    @pytest.mark.parametrize("moment", ["replace", "fsync"])
    def test_a_crash_while_saving_leaves_the_one_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        writer = self.save(tmp_path, {1: None})
        monkeypatch.setattr(os, moment, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        writer.save(tiny_model(), {"step": 2}, 2, None)
        with pytest.raises(CheckpointError, match=r"No space left on device.*the ones before it are whole"):
            writer.wait()
        monkeypatch.undo()
        assert [c.step for c in find_checkpoints(tmp_path)] == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
        writer.save(tiny_model(), {"step": 3}, 3, None)
        writer.wait()
        assert [c.step for c in find_checkpoints(tmp_path)] == [1, 3]

    @pytest.mark.parametrize("part", ["model", "state"])
    def test_a_disk_full_in_the_middle_of_a_file_leaves_the_one_before(self, tmp_path: Path, part: str) -> None:
        writer = self.save(tmp_path, {1: None})
        whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        weights = (tmp_path / "step-00000001" / "model" / "model.safetensors").stat().st_size
        with file_size_limit(weights // 2 if part == "model" else 2 * weights):
            writer.save(tiny_model(), {"tensor": torch.zeros(weights)}, 2, None)
            with pytest.raises(CheckpointError, match=r"could not be written to .*the ones before it are whole"):
                writer.wait()
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]

    def test_a_run_on_a_full_disk_ends_with_the_error_and_goes_on_later(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        write = CheckpointWriter._write

        def full_from_step_6(self: CheckpointWriter, model: Any, state: Any, step: int, val_loss: Any) -> None:
            with file_size_limit(5_000) if step >= 6 else contextlib.nullcontext():
                write(self, model, state, step, val_loss)

        monkeypatch.setattr(CheckpointWriter, "_write", full_from_step_6)
        with pytest.raises(CheckpointError, match=f"could not be written to {run}.*the ones before it are whole"):
            start_run(tiny_config(dataset), run, display=quiet())
        monkeypatch.undo()
        assert [c.step for c in find_checkpoints(run / "checkpoints")][-1] < 6
        assert resume_run(run, display=quiet()).reason == "done"

    def test_copies_reuse_their_memory(self, tmp_path: Path) -> None:
        first = copied({"a": [torch.ones(3)], "b": {"c": torch.zeros(2)}, "d": 1})
        memory = first["a"][0].data_ptr()
        second = copied({"a": [torch.full((3,), 2.0)], "b": {"c": torch.ones(5)}, "d": 2}, first)
        assert second["a"][0].data_ptr() == memory
        assert second["a"][0].tolist() == [2, 2, 2] and second["b"]["c"].tolist() == [1] * 5 and second["d"] == 2

    def test_a_damaged_checkpoint_is_named(self, tmp_path: Path) -> None:
        self.save(tmp_path / "c", {1: None})
        step = tmp_path / "c" / "step-00000001"
        for damage, message in (
            (lambda: os.truncate(step / "model" / "model.safetensors", 100), r"model\.safetensors has 100 bytes"),
            (lambda: (step / "state.pt").unlink(), r"incomplete: state\.pt is missing"),
            (lambda: (step / "checkpoint.json").write_text("{"), r"checkpoint\.json is damaged"),
            (lambda: (step / "checkpoint.json").unlink(), "not a whole checkpoint"),
        ):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "c", copy, dirs_exist_ok=True)
            damage()
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                find_checkpoint(tmp_path / "c", "last")
            assert find_checkpoints(tmp_path / "c") == []
            shutil.rmtree(tmp_path / "c")
            shutil.copytree(copy, tmp_path / "c")
        size = (step / "state.pt").stat().st_size
        (step / "state.pt").write_bytes(bytes(size))
        with pytest.raises(ValueError, match=r"state\.pt is damaged"):
            find_checkpoints(tmp_path / "c")[0].load_state()

    def test_only_the_checkpoint_that_is_wanted_must_be_whole(self, tmp_path: Path) -> None:
        writer = self.save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, keep_last=3)
        (tmp_path / "step-00000001" / "state.pt").unlink()
        for which, step in (("best", 2), ("last", 3)):
            found = find_checkpoint(tmp_path, which)
            assert found is not None and found.step == step
        writer.save(tiny_model(), {}, 4, 2.5)
        writer.wait()
        assert [c.step for c in find_checkpoints(tmp_path)] == [2, 3, 4]
        (tmp_path / "step-00000002" / "state.pt").unlink()
        with pytest.raises(FileNotFoundError, match=r"step-00000002 is incomplete: state\.pt is missing"):
            find_checkpoint(tmp_path, "best")
        (tmp_path / "step-00000005").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="step-00000005 is not a whole checkpoint"):
            find_checkpoint(tmp_path, "last")
        assert (tmp_path / "step-00000001").is_dir()  # what is damaged is left for who wants to mend it

    def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(path: Path, **_: Any) -> None:
            if Path(path).exists():
                (Path(path) / "state.pt").unlink()
                raise OSError("killed")

        writer = self.save(tmp_path, {1: None}, keep_last=1)
        monkeypatch.setattr(shutil, "rmtree", killed)
        writer.save(tiny_model(), {}, 2, None)
        with pytest.raises(CheckpointError, match="killed"):
            writer.wait()
        monkeypatch.undo()
        assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000002"]
        CheckpointWriter(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]

    def test_a_reader_takes_the_next_one_where_training_removes_the_one_it_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "config.toml").touch()
        writer = self.save(tmp_path / "checkpoints", {1: None}, keep_last=1)

        def train_on(step: int) -> None:
            writer.save(tiny_model(), {}, step, None)
            writer.wait()

        def late(do: Callable[[Path], Any], step: int) -> Callable[[Path], Any]:
            """`do`, but the training has reached the step before its first call is under way."""
            steps = [step]

            def done_late(path: Path) -> Any:
                if steps:
                    train_on(steps.pop())
                return do(path)

            return done_late

        monkeypatch.setattr(checkpoint, "open_checkpoint", late(open_checkpoint, 2))

        def mapped(folder: Path) -> Any:  # a RuntimeError where the file is gone
            return torch.UntypedStorage.from_file(str(folder / "model.safetensors"), False, 1)

        _, weights, _ = load_found(tmp_path, "last", late(mapped, 3))
        assert weights.parent.name == "step-00000003"
        _, weights, _ = load_found(tmp_path, "last", late(GPT.from_pretrained, 4))
        assert weights.parent.name == "step-00000004"
        (weights / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"incomplete: model/config\.json"):
            load_found(tmp_path, "last", GPT.from_pretrained)

    def test_every_generator_is_restored(self) -> None:
        import random

        import numpy as np

        def draw() -> list[float]:
            return [
                random.random(),
                float(np.random.rand()),
                np.random.randn(),
                random.gauss(0, 1),
                float(torch.rand(())),
            ]

        draw()
        state = rng_state()
        expected = draw()
        draw()
        set_rng_state(state)
        assert draw() == expected


class TestJournal:
    def test_a_resumed_log_goes_on_after_the_step(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        journal = Journal(path)
        journal.write("start", step=0)
        for step in range(1, 6):
            journal.write("step", step=step, loss=0.1 + step)
        journal.close()
        with path.open("a") as f:
            f.write('{"kind": "st')
        journal = Journal(path, keep_until_step=3)
        journal.write("step", step=4, loss=1.0)
        journal.close()
        assert [(r["kind"], r["step"]) for r in read_journal(path)] == [
            ("start", 0),
            *[("step", i) for i in (1, 2, 3, 4)],
        ]
        assert all(json.loads(line) for line in path.read_text().splitlines())

    def test_numbers_keep_all_their_digits(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "log.jsonl")
        journal.write("step", step=1, loss=0.1 + 0.2, text="世")
        journal.close()
        assert read_journal(tmp_path / "log.jsonl")[0] == {"kind": "step", "step": 1, "loss": 0.1 + 0.2, "text": "世"}


def test_devices_and_precisions() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device must be auto, cpu, or cuda"):
        resolve_device("tpu9")
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
