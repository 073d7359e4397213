"""The LSTM in the training loop, and in the commands that evaluate and sample."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.evaluation.text import score_tokens
from fastlm.models.lstm import LSTMLM
from fastlm.training import choose_checkpoint, load_config, resume_run, start_run
from fastlm.training.config import RunConfig, config_from_dict
from fastlm.training.journal import read_journal
from fastlm.training.recurrent import HiddenStates
from tests.training_runs import SENTENCE, one_thread, quiet, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"embedding_dim": 12, "hidden_dim": 24, "num_layers": 2, "block_size": 16}


def lstm_config(dataset: Path, **training: Any) -> RunConfig:
    return config_from_dict(
        {
            "model": SHAPE,
            "data": {"path": str(dataset)},
            "training": {
                "objective": "recurrent", "steps": 12, "batch_size": 4, "grad_accum": 2, "lr": 2e-2, "warmup_steps": 2,
                "device": "cpu", **training,
            },
            "evaluation": {"every": 4, "windows": 16, "sample_every": 6, "sample_tokens": 4},
            "checkpoint": {"every": 3, "keep_last": 10},
        }
    )  # fmt: skip


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_journal(run / "log.jsonl") if r["kind"] == "step"]


@pytest.fixture(scope="module")
def trained(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("lstm")
    start_run(
        lstm_config(write_tiny_dataset(folder / "data"), steps=120, grad_accum=1), folder / "run", display=quiet()
    )
    (folder / "text.txt").write_text(SENTENCE * 2)
    return folder


def test_it_learns_and_a_resumed_run_is_the_same(trained: Path, tmp_path: Path) -> None:
    curve = losses(trained / "run")
    assert curve[0][1] == pytest.approx(math.log(29), abs=0.2)
    assert curve[-1][1] < 0.6 * curve[0][1]
    start_run(lstm_config(trained / "data", schedule="constant"), tmp_path / "whole", display=quiet())
    start_run(lstm_config(trained / "data", schedule="constant", steps=6), tmp_path / "halves", display=quiet())
    resume_run(tmp_path / "halves", overrides=("training.steps=12",), display=quiet())
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    weights = [choose_checkpoint(tmp_path / r, "last").model_path / "model.safetensors" for r in ("whole", "halves")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_state_is_carried_and_the_gradient_is_not() -> None:
    torch.manual_seed(0)
    model = LSTMLM(7, 4, 5, 1)
    x, y = torch.randint(7, (2, 8)), torch.randint(7, (2, 8))
    states = HiddenStates()
    first = states.loss(model, x[:, :4], y[:, :4], 0, True)
    second = states.loss(model, x[:, 4:], y[:, 4:], 0, False)
    whole, _ = model(x, targets=y)
    torch.testing.assert_close((first + second) / 2, whole)
    assert not any(t.requires_grad for t in states.state_dict()[0])
    second.backward()  # the graph of the first window is not reached
    anew = states.loss(model, x[:, 4:], y[:, 4:], 0, True)
    other = states.loss(model, x[:, 4:], y[:, 4:], None, False)
    torch.testing.assert_close(anew, other)
    assert anew.item() != second.item()


def test_the_rows_keep_their_states_in_another_layout(trained: Path, tmp_path: Path) -> None:
    rows = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))  # (L, rows, H)

    def layout(batch_size: int, world_size: int) -> list[dict[int, Any]]:
        """By rank: stream after stream the rows of all processes lie side by side."""
        batches = [(part, -part) for part in rows.split(batch_size, 1)]
        return [dict(enumerate(batches[rank::world_size])) for rank in range(world_size)]

    for saved in (layout(3, 2), layout(12, 1), layout(2, 3)):
        for batch_size, world_size in ((3, 2), (2, 2), (4, 1), (6, 2)):
            for rank, wanted in enumerate(layout(batch_size, world_size)):
                states = HiddenStates()
                states.load_state_dict(saved, batch_size, rank, world_size, torch.device("cpu"))
                torch.testing.assert_close(states.state_dict(), wanted, rtol=0, atol=0)

    one_batch = {"schedule": "constant", "batch_size": 8, "grad_accum": 1}
    start_run(lstm_config(trained / "data", **one_batch), tmp_path / "whole", display=quiet())
    start_run(lstm_config(trained / "data", schedule="constant", steps=6), tmp_path / "run", display=quiet())
    changes = ("training.steps=12", "training.batch_size=8", "training.grad_accum=1")
    resume_run(tmp_path / "run", overrides=changes, display=quiet())
    for got, expected in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


def test_every_token_is_scored_once_with_all_before_it(trained: Path) -> None:
    model = LSTMLM.from_pretrained(choose_checkpoint(trained / "run").model_path)
    ids = np.random.default_rng(0).integers(0, 28, 2500)
    total, count = score_tokens(model, ids, first=28)
    logits, _ = model(torch.tensor([[28, *ids[:-1]]]))
    expected = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids), reduction="sum").item()
    assert count == 2500
    assert total == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="without windows; got stride=3"):
        score_tokens(model, ids, stride=3)


def test_the_commands(trained: Path, tmp_path: Path) -> None:
    def succeeds(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    score = json.loads(succeeds("evaluate", trained / "run", "--text", trained / "text.txt", "--json"))
    assert score["tokens"] == len(SENTENCE * 2) and 0 < score["bits_per_byte"] < 4
    succeeds("evaluate", trained / "run", "--data", trained / "data", "--json")
    rows = [{"ctx": SENTENCE * 3 + "the quick", "endings": ["brown fox", "xqz zzq"], "label": 0}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choice = json.loads(succeeds("evaluate", trained / "run", "--choices", tmp_path / "q.jsonl", "--json"))
    assert (choice["questions"], choice["shortened"]) == (1, 0)
    long = SENTENCE * 2  # beyond block_size
    text = succeeds("generate", trained / "run", "--prompt", long, "--max-new-tokens", 20, "--temperature", 0)
    assert text.startswith(long) and len(text) == len(long) + 21


def test_bad_settings(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data")
    for override, message in (
        ("model.n_layer=2", r"unknown key model\.n_layer.*there are: .*num_layers"),
        ("model.hidden_dim=0", "hidden_dim must be an integer of at least 1"),
        ("model.vocab_size=5", "smaller than the tokenizer's vocabulary of 29"),
        ("training.batch_size=500", r"the text is too short: .* each of 500 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            start_run(
                load_config(None, ["training.objective=recurrent", f"data.path='{data}'", override]),
                tmp_path / "run",
                display=quiet(),
            )
        assert not (tmp_path / "run").exists()
