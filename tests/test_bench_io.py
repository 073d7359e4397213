"""The benchmarks around the training step, small: what they report, and that the compared results are equal."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastlm.bench import io
from fastlm.bench.lstm import compare
from tests.conftest import ROOT
from tests.training_runs import SENTENCE, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. {SENTENCE}" for i in range(2000)))
    return path


def test_loader_prepare_checkpoint_and_batches(text: Path) -> None:
    results = io.run(text, rounds=1, scale=0.01)
    assert set(results) == set(io.PARTS)
    assert results["batching"]["same_tokens"]
    assert results["checkpoint"]["megabytes_copied"] == 3 * results["checkpoint"]["megabytes_of_weights"]
    numbers = [v for part in results.values() for k, v in part.items() if k != "same_tokens"]
    assert all(n > 0 for n in numbers)


def test_a_text_that_is_too_small_or_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(io, "run", lambda *_: pytest.fail("it began"))
    (tmp_path / "a.txt").write_text("hello\n")
    for name, message in (("a.txt", "has 6 bytes, wanted a text of at least 1,000,000"), ("b.txt", "no such file")):
        monkeypatch.setattr(sys, "argv", ["io", str(tmp_path / name)])
        with pytest.raises(SystemExit, match="2"):
            io.main()
        assert message in capsys.readouterr().err


def test_the_lstm_layer_computes_what_torchs_does() -> None:
    comparison = compare(4, 6, 24, 1)
    assert [r.peer for r in comparison.results] == ["fastlm", "eager"]
    assert comparison.results[0].error is not None and comparison.results[0].error < 1e-5


def test_nanogpts_model_is_the_same_model(text: Path) -> None:
    results = script("nanogpt").run(text, 4, True)
    losses = [r["losses"] for r in results.values()]
    assert list(results) == ["fastlm", "eager", "textbook attention"]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)
    assert all(r["seconds"] > 0 and r["val_loss"] > 0 for r in results.values())


def test_the_page_of_the_runs_is_made_from_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = script("runs")
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(runs, "PAGE", tmp_path / "runs.md")
    result = {"parameters": 804096, "last_val_loss": 1.87654, "tokens_per_second": 12345.6, "examples": [["a", "b"]]}
    step = {"command": "fastlm train --out x", "label": "", "seconds": 12.3, "result": result}
    content = {"name": "shakespeare", "environment": runs.report.environment(), "steps": [step]}
    (tmp_path / "shakespeare.json").write_text(json.dumps(content))
    runs.write_page()
    page = (tmp_path / "runs.md").read_text()
    for words in (
        runs.RUNS["shakespeare"].title,
        "fastlm train --out x",
        "| 804,096 |",
        "| 1.8765 |",
        "12,346",
        "a → b",
    ):
        assert words in page
    for name, run in runs.RUNS.items():
        for command in run.commands:
            words = command.format(data="D", work="W").rpartition(": ")[2].split()
            assert words[0] in ("fastlm", "python"), name
            if "--config" in words:
                assert (ROOT / words[words.index("--config") + 1]).is_file()
