"""What is shown and where numbers go: the live bar, plain lines, the picture, the trackers."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastlm.cli.train import report
from fastlm.training import TrainResult, start_run
from fastlm.training.journal import Journal, read_journal
from fastlm.training.plot import _smoothed, plot_losses
from fastlm.training.progress import LiveDisplay, PlainDisplay, Speed, make_display
from fastlm.training.trainer import NonFiniteLossError, Trainer
from tests.training_runs import one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401


def show(console: Console, seconds: float = 0.0) -> str:
    display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console, seconds)
    display.start(10, 20)
    display.step(11, 3.25, 100)
    display.evaluation(11, 2.5, 1.5)
    display.step(12, 3.125, 100)
    display.note("[a note] in brackets")
    display.stop()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_bar_has_loss_validation_speed_and_time_left() -> None:
    out = show(Console(file=io.StringIO(), force_terminal=True, width=200))
    for words in ("12/20", "3.125", "val 1.500 bits/byte", "tok/s", "left", "[a note] in brackets"):
        assert words in out


def test_the_bar_fits_into_80_columns() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    display = LiveDisplay(console)
    display.start(0, 100_000)
    display.evaluation(0, 10.0, 1.5)
    display.speed.tokens_per_second, display.speed.steps_per_second = 999_900.0, 0.25
    display.speed.update = lambda step, tokens: None  # type: ignore[method-assign]
    display.step(1, 10.123, 100)
    display.stop()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/100000 loss 10.123  val 1.500 bits/byte 999.9k tok/s 111:06:36 left" in shown


def test_a_log_gets_plain_lines_and_not_one_a_step() -> None:
    lines = show(Console(file=io.StringIO(), width=40)).splitlines()
    assert [line.split("  ")[:2] for line in lines[:2]] == [
        ["step 11/20", "loss 3.250"],
        ["step 11/20", "validation loss 2.500"],
    ]
    assert "[a note] in brackets" in lines
    assert not any("\x1b" in line for line in lines)
    assert len(show(Console(file=io.StringIO()), seconds=60).splitlines()) == 3  # step 1, the evaluation, the note


def test_a_run_says_at_once_what_it_trains_and_on_what(
    one_thread: None,  # noqa: F811
    tmp_path: Path,
) -> None:
    def lines(run: str, **training: object) -> list[str]:
        config = tiny_config(write_tiny_dataset(tmp_path / f"{run}-data"), training={"steps": 2, **training})
        console = Console(file=io.StringIO(), width=40)
        start_run(config, tmp_path / run, display=PlainDisplay(console))
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    said = lines("run")
    assert said[0].startswith("model: 2 layers, 16 wide, ")
    assert said[0].endswith(" parameters; 2 steps of 128 tokens on cpu, 1 threads")
    assert said[1].startswith("step 1/2  loss ")
    assert lines("long", warmup_steps=3)[1] == (
        "note: training.warmup_steps=3 is more than training.steps=2: "
        "the learning rate rises over all of them and never falls"
    )


def test_the_end_of_a_run_is_one_line_however_narrow_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=20)
    report(TrainResult("done", 1000, 3.25, 3.5, 3.5, 12_345.0), Path("run"), "train", console)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "done at step 1000  loss 3.2500  best validation loss 3.5000  12,345 tok/s",
        "run: run",
    ]


def test_the_display_fits_the_console() -> None:
    assert isinstance(make_display(Console(force_terminal=True))._display, LiveDisplay)
    assert isinstance(make_display(Console(file=io.StringIO()))._display, PlainDisplay)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_display_that_nobody_reads_falls_silent(error: OSError, terminal: bool) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    display = make_display(Console(file=Closed(), force_terminal=terminal))
    display.start(10, 20)
    display.step(11, 3.25, 100)
    display.evaluation(11, 2.5, 1.5)
    display.note("a note")
    display.stop()
    assert display._display is None


def test_the_journal_survives_every_separator_of_lines(tmp_path: Path) -> None:
    texts = ["a\x85b", "a\u2028b\u2029", "a\x0bb\x0c\x1c"]
    journal = Journal(tmp_path / "log.jsonl")
    for step, text in enumerate(texts):
        journal.write("sample", step=step, text=text)
    journal.close()
    assert [r["text"] for r in read_journal(tmp_path / "log.jsonl")] == texts
    Journal(tmp_path / "log.jsonl", keep_until_step=1).close()
    assert [r["text"] for r in read_journal(tmp_path / "log.jsonl")] == texts[:2]


def test_speed_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastlm.training.progress.time.perf_counter", lambda: now[0])
    speed = Speed()
    speed.start(0)
    for step in range(1, 5):
        now[0] += 2
        speed.update(step, 10)
    assert (speed.tokens_per_second, speed.steps_per_second) == (5, 0.5)
    now[0] += 1000  # an evaluation
    speed.start(4)
    now[0] += 1
    speed.update(5, 10)
    assert (speed.tokens_per_second, speed.steps_per_second) == (10, 1)
    for step in range(6, 40):  # only the last seconds count
        now[0] += 5
        speed.update(step, 10)
    assert speed.tokens_per_second == pytest.approx(2)


def test_the_picture_is_drawn_from_the_log(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl")
    for step in range(1, 30):
        journal.write("step", step=step, loss=5 / step)
    journal.write("eval", step=29, val_loss=1.0)
    journal.close()
    plot_losses(tmp_path / "log.jsonl", tmp_path / "a.png", title="t", bytes_per_token=3.0, gzip_bits=2.0)
    plot_losses(tmp_path / "log.jsonl", tmp_path / "b.png")
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert all(p.startswith(b"\x89PNG") for p in pictures)
    assert pictures[0] != pictures[1]


def test_a_picture_ends_no_run_and_hides_no_error(
    one_thread: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no colours left")

    def diverge(_: Trainer) -> None:
        raise NonFiniteLossError("the loss is infinite")

    config = tiny_config(write_tiny_dataset(tmp_path / "data"), training={"steps": 1})
    start_run(config, tmp_path / "r_$lr_$", display=quiet())  # dollars are no formula
    assert (tmp_path / "r_$lr_$" / "loss.png").is_file()
    monkeypatch.setattr("fastlm.training.run.plot_losses", fail)
    console = Console(file=io.StringIO(), width=200)
    assert start_run(config, tmp_path / "run", display=LiveDisplay(console)).reason == "done"
    assert "loss.png could not be drawn: RuntimeError: no colours left" in console.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(Trainer, "fit", diverge)
    with pytest.raises(NonFiniteLossError, match="the loss is infinite"):
        start_run(config, tmp_path / "other", display=quiet())


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert _smoothed([2.0] * 200) == pytest.approx([2.0] * 200)
    curve = _smoothed([1.0] * 100 + [0.0] * 100)
    assert curve[99] == pytest.approx(1.0)
    assert curve[199] < 0.01
    assert _smoothed([]) == []


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_numbers_of_the_log(
    one_thread: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    calls: list[tuple[str, object]] = []
    fake = SimpleNamespace(
        __spec__=SimpleNamespace(),
        init=lambda **settings: calls.append(("init", settings)),
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    config = tiny_config(
        write_tiny_dataset(tmp_path / "data"),
        training={"steps": 2},
        evaluation={"every": 2},
        logging={name: True, "project": "p"},
    )
    start_run(config, tmp_path / "run", display=quiet())
    losses = [r["loss"] for r in read_journal(tmp_path / "run" / "log.jsonl") if r["kind"] == "step"]
    kind, settings = calls[0]
    assert (kind, settings["project"], settings["name"]) == ("init", "p", "run")  # type: ignore[index]
    assert settings["config"]["training"]["steps"] == 2  # type: ignore[index]
    assert ("dir" in settings) == (name == "wandb")  # type: ignore[operator] # wandb's files, offline too, go to the run
    assert calls[-1] == ("finish", None)
    logged = [value for kind, value in calls if kind == "log"]
    assert [(step, values["step/loss"]) for step, values in logged[:2]] == [(1, losses[0]), (2, losses[1])]  # type: ignore[misc]
    assert "eval/val_loss" in logged[2][1]  # type: ignore[index]


def test_tensorboard_gets_the_numbers_of_the_log(one_thread: None, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(
        write_tiny_dataset(tmp_path / "data"),
        training={"steps": 3},
        evaluation={"every": 3},
        logging={"tensorboard": True},
    )
    start_run(config, tmp_path / "run", display=quiet())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    journal = read_journal(tmp_path / "run" / "log.jsonl")
    shown = [(e.step, e.value) for e in events.Scalars("step/loss")]
    assert shown == [(r["step"], pytest.approx(r["loss"])) for r in journal if r["kind"] == "step"]
    assert [e.step for e in events.Scalars("eval/val_loss")] == [3]


def test_wandb_writes_offline(
    one_thread: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny_config(write_tiny_dataset(tmp_path / "data"), training={"steps": 2}, logging={"wandb": True})
    start_run(config, tmp_path / "run", display=quiet())
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
