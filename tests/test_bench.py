"""What `fastlm bench` reports: statistics, checks of the numbers, reasons, files. No times are asserted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fastlm
from fastlm.bench import memory, ops, report, steps, timing
from fastlm.bench.ops import BACKWARD, FORWARD, STEP
from fastlm.bench.plots import write_plots
from fastlm.bench.run import Options
from fastlm.bench.steps import Size, compare_generation, compare_training
from fastlm.bench.textbook import TextbookGPT
from fastlm.bench.timing import Comparison, Result, interleave
from fastlm.cli import app
from fastlm.ops.case import Case, Maker, all_cases

CONFIG = fastlm.GPTConfig(vocab_size=61, block_size=72, n_layer=2, n_head=2, n_embd=32)
TINY = Size("tiny", CONFIG, 2, 16)
NO_COMPILER = {"torch.compile"}


def result_of(comparison: Comparison, peer: str) -> Result:
    return next(r for r in comparison.results if r.peer == peer)


# Statistics


def test_the_speedup_is_the_median_of_the_ratios_within_the_rounds() -> None:
    eager, ours = Result("eager", [2.0, 20.0, 4.0, 8.0, 6.0]), Result("fastlm", [1.0, 4.0, 4.0, 2.0, 2.0])
    comparison = Comparison("op", "x", "forward", "float32", [eager, ours, Result("absent", reason="not installed")])
    assert comparison.speedup(ours) == (3.0, 2.0, 4.0)  # of 2, 5, 1, 4, 3
    assert comparison.speedup(eager) == (1.0, 1.0, 1.0)
    assert comparison.speedup(comparison.results[2]) is None
    assert ours.median == 2.0
    alone = Comparison("op", "x", "forward", "float32", [ours])
    assert alone.speedup(ours) is None


def test_peers_are_measured_in_turns_and_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    results = interleave(calls, rounds=3)
    assert "".join(seen) == "aabbcc" + "abc" + "cba" + "abc"
    assert all(len(r.seconds) == 3 for r in results.values())


def test_short_calls_are_made_as_often_before_their_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    calls = {name: lambda name=name: timed.append(name) for name in "ab"}
    lengths = {"a": 4e-3, "b": 4.0}

    def seconds_of(call: Callable[[], object], repeats: int = 1) -> float:
        before = len(timed)
        for _ in range(repeats):
            call()
        timed[before:] = [timed[-1].upper()] * repeats
        return lengths[timed[-1].lower()]

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    interleave(calls, rounds=1)
    assert "".join(timed) == "aA" + "bB" + "aaAA" + "B"


def test_a_peer_that_fails_is_listed_with_its_reason() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nand much more")

    results = interleave({"good": lambda: None, "broken": broken}, rounds=2)
    assert results["broken"].reason == "no such kernel" and not results["broken"].seconds
    assert results["good"].reason is None and len(results["good"].seconds) == 2


def test_the_budget_ends_the_rounds_after_three() -> None:
    assert len(interleave({"a": lambda: None}, rounds=50, budget=0.0)["a"].seconds) == 3


# Ops


def small(op: str) -> Case:
    """The op's first test case, as a benchmark case."""
    return next(case for case in all_cases() if case.op == op)


@pytest.mark.parametrize("op", ["layer_norm", "attention", "attention_qkvpacked", "mlp", "linear_cross_entropy"])
def test_an_op_is_timed_and_its_numbers_checked(op: str) -> None:
    comparisons = list(ops.compare(small(op), torch.float32, "cpu", 2, 1.0, NO_COMPILER))
    assert [c.mode for c in comparisons] == [FORWARD, BACKWARD]
    for comparison in comparisons:
        ran = [r for r in comparison.results if r.seconds]
        assert "eager" in {r.peer for r in ran} and any(r.peer.startswith("fastlm") for r in ran)
        assert all(r.error is not None and r.error < 1e-5 for r in ran)
        assert all(r.reason for r in comparison.results if not r.seconds)


def test_a_wrong_peer_shows_in_the_error() -> None:
    case = small("layer_norm")
    wrong = Case(case.op, case.name, case.build, lambda **arguments: case.eager(**arguments) * 1.01)
    for comparison in ops.compare(wrong, torch.float32, "cpu", 1, 1.0, NO_COMPILER):
        assert result_of(comparison, "eager").error == pytest.approx(0.01, rel=1e-3)


def test_the_optimizer_is_measured_in_place() -> None:
    def build(make: Maker) -> dict[str, Any]:
        tensors = {name: [make.randn(4, 3), make.randn(5)] for name in ("params", "grads", "exp_avgs")}
        squares = [t.square() for t in tensors["grads"]]
        return {**tensors, "exp_avg_sqs": squares, "step": 3, "lr": 0.1, "weight_decay": 0.1}

    big = next(case for case in all_cases(bench=True) if case.op == "adamw_")
    case = Case(big.op, "tiny", build, big.eager, bench=True, traits=big.traits)
    (comparison,) = ops.compare(case, torch.float32, "cpu", 2, 1.0, NO_COMPILER)
    assert comparison.mode == STEP and comparison.name == "adamw tiny"
    for peer in ("eager", "torch fused"):
        assert result_of(comparison, peer).error < 1e-5


def test_cases_by_name() -> None:
    assert {case.op for case in ops.cases(["layer_norm", "adamw"])} == {"layer_norm", "adamw_"}
    first, every = ops.cases(), ops.cases(full=True)
    assert len(first) < len(every) and {c.op for c in first} == {c.op for c in every}
    assert all(case.bench for case in every)
    with pytest.raises(ValueError, match=r"no op 'softmax' with benchmark cases; the ops are: .*layer_norm"):
        ops.cases(["softmax"])


# Models


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_textbook_model_computes_what_ours_does(sdpa: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.from_dict({**CONFIG.to_dict(), "bias": bias}))
    textbook = TextbookGPT(model.config, sdpa)
    textbook.load_state_dict(copy.deepcopy(model.state_dict()))
    idx, targets = torch.randint(61, (2, 3, 40))
    loss, wanted = model(idx, targets)[1], textbook(idx, targets)[1]
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    gradients = dict(textbook.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    prompt = idx[:1, :9]
    assert torch.equal(textbook.generate(prompt, 12), model.generate(prompt, 12, temperature=0.0))


def test_the_textbook_model_is_gpt2_only() -> None:
    with pytest.raises(ValueError, match="activation must be gelu or gelu_tanh, got 'swiglu'"):
        TextbookGPT(fastlm.GPTConfig.preset("llama-nano", norm="layer_norm"))


def test_training_is_timed_and_its_losses_checked() -> None:
    comparison = compare_training(TINY, torch.float32, "cpu", 2, 1.0, NO_COMPILER)
    for result in comparison.results:
        if result.reason is not None:
            assert result.peer == "transformers", result.reason
            continue
        assert len(result.seconds) == 2 and result.error < 1e-4, result.peer
        assert result.extra["loss"][-1] < result.extra["loss"][0] and result.extra["tokens_per_second"] > 0


def test_a_training_that_differs_shows_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = steps.Trainer.__init__

    def other_rate(self: Any, peer: str, *arguments: Any) -> None:
        original(self, peer, *arguments)
        if peer == "sdpa":
            self.optimizer.param_groups[0]["lr"] = 1e-2

    monkeypatch.setattr(steps.Trainer, "__init__", other_rate)
    comparison = compare_training(TINY, torch.float32, "cpu", 1, 1.0, {*NO_COMPILER, "transformers"})
    assert result_of(comparison, "sdpa").error > 1e-3 > result_of(comparison, "fastlm").error


def test_generation_is_timed_and_its_tokens_checked() -> None:
    comparison = compare_generation(TINY, torch.float32, "cpu", 1, 1.0, set())
    assert comparison.name == "generation tiny 64+8"
    assert "compiled anew" in str(result_of(comparison, "torch.compile").reason)
    for result in comparison.results:
        if result.seconds:
            assert result.error == 0.0, result.peer


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PEERS", ("eager", "nobody"))
    comparison = memory.compare_memory("nano", torch.float32, "cpu", set())
    eager, nobody = comparison.results
    assert eager.reason is None and eager.peak_bytes > eager.extra["before_bytes"] > 0
    assert len(eager.extra["loss"]) == memory.STEPS
    assert nobody.peak_bytes is None and "no peer 'nobody'" in str(nobody.reason)


# The report


def comparisons() -> list[Comparison]:
    ours, eager = Result("fastlm cpu", [1e-3, 2e-3, 1e-3], error=1e-7), Result("eager", [2e-3, 3e-3, 2e-3], error=2e-7)
    absent = Result("liger", reason="liger_kernel is not installed")
    step = Result("fastlm", [1.0], error=0.0, extra={"tokens_per_second": 1024.0, "loss": [4.0]})
    peaks = [Result("eager", peak_bytes=2**30, extra={"before_bytes": 2**28})]
    peaks.append(Result("fastlm", peak_bytes=2**29, extra={"before_bytes": 2**28}))
    return [
        Comparison("op", "layer_norm 1024x768", "forward", "float32", [eager, ours, absent]),
        Comparison("step", "training nano", "step", "float32", [Result("eager", [2.0], error=0.0), step]),
        Comparison("memory", "training nano", "peak memory", "float32", peaks),
    ]


def test_tables_say_what_was_measured_and_what_was_not() -> None:
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    for comparison in comparisons():
        console.print(report.table(comparison))
    console.print(report.absent(comparisons()))
    text = console.export_text()
    for part in ("2.00x", "1.75 to 2.00", "1e-07", "1 ms", "1,024", "512 MiB", "50%", "liger_kernel is not installed"):
        assert part in text, part
    assert report.absent(comparisons()[1:]) is None


def test_the_json_holds_the_times_and_where_they_were_taken(tmp_path: Path) -> None:
    where = report.environment()
    report.write_json(tmp_path / "report.json", where, {"rounds": 3}, comparisons())
    got = json.loads((tmp_path / "report.json").read_text())
    assert got["environment"]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert got["environment"]["threads"] == torch.get_num_threads() and got["environment"]["date"]
    assert got["options"] == {"rounds": 3}
    _, ours, absent = got["comparisons"][0]["peers"]
    assert ours["seconds"] == [1e-3, 2e-3, 1e-3] and ours["speedup"]["median"] == 2.0 and ours["error"] == 1e-7
    assert absent["reason"] == "liger_kernel is not installed" and absent["speedup"] is None


def test_pictures_are_written(tmp_path: Path) -> None:
    where = {"gpu": None, "cpu": "a processor", "threads": 2}
    written = write_plots(tmp_path, comparisons(), where)
    assert [p.name for p in written] == ["ops.png", "steps.png", "memory.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    assert write_plots(tmp_path, [], where) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 µs"), (1234.0, "1234 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


# The command


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    options = ["bench", "--quick", "--ops", "rms_norm", "--sizes", "none", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "rms_norm" in done.output and "layer_norm 4x64" in done.output and "Written" in done.output
    got = json.loads((tmp_path / "report.json").read_text())
    assert {c["group"] for c in got["comparisons"]} == {"overhead", "op"} and (tmp_path / "ops.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ("giant",)}, "there is no size 'giant'; the sizes are: nano"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**{"ops": None, "sizes": (), "dtype": "float32", "device": "cpu", **changes})
