"""Translation: pairs, their batches, the encoder-decoder, and both ways to learn it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data import ByteTokenizer
from fastlm.evaluation.translation import score_translations
from fastlm.generation.beam import search
from fastlm.generation.seq2seq import Translations
from fastlm.models.config import GPTConfig
from fastlm.models.seq2seq import EncoderDecoder
from fastlm.tasks.registry import finetune, make_task
from fastlm.tasks.translation import PairLoader, SourceLoader, TranslationSettings, encode_pairs, read_pairs
from fastlm.training import start_run
from fastlm.training.config import config_from_dict
from fastlm.training.distributed import Processes
from fastlm.training.journal import read_journal
from tests.training_runs import one_thread, quiet  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = {"one": "un", "two": "deux", "three": "trois", "red": "rouge", "blue": "bleu", "cat": "chat", "dog": "chien"}
PAIRS = [
    (f"{n} {c} {a}.", f"{WORDS[n]} {WORDS[a]} {WORDS[c]}.")
    for n in ("one", "two", "three") for c in ("red", "blue") for a in ("cat", "dog")
]  # fmt: skip


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    return path


def settings(path: Path, architecture: str, steps: int, **task: Any) -> Any:
    return config_from_dict(
        {
            "task": {
                "name": "translation", "model": "new", "train": str(path), "val": str(path), "vocab_size": 300,
                "architecture": architecture, "beams": 3, "max_new_tokens": 24, **task,
            },
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": 64},
            "training": {"steps": steps, "batch_size": 6, "lr": 4e-3, "warmup_steps": 5, "device": "cpu"},
            "evaluation": {"every": 40, "windows": 100},
            "checkpoint": {"every": 0},
        }
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_it_learns_to_translate(pairs_file: Path, tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("sacrebleu")
    _, metrics = finetune(settings(pairs_file, architecture, 160), tmp_path / "run", display=quiet())
    assert metrics["pairs"] == len(PAIRS)
    assert metrics["bleu"] > 60 > metrics["frequent_bleu"] > metrics["copy_bleu"]
    assert metrics["chrf"] > metrics["frequent_chrf"]
    assert (tmp_path / "run" / "metrics.json").is_file()
    rows = [line.split("\t") for line in (tmp_path / "run" / "translations.tsv").read_text().splitlines()]
    assert [(a, b) for a, b, _ in rows] == PAIRS
    sources = [a for a, _, _ in rows[:3]]
    arguments = ["translate", str(tmp_path / "run"), "--beams", "3", *[x for s in sources for x in ("--text", s)]]
    command = CliRunner().invoke(app, arguments)
    assert command.exit_code == 0, command.output
    assert command.stdout.splitlines() == [c for _, _, c in rows[:3]]
    blank = CliRunner().invoke(app, arguments[:4], input="\n".join([sources[0], "", sources[1], " "]))
    assert blank.stdout.splitlines() == [rows[0][2], "", rows[1][2], ""]
    assert CliRunner().invoke(app, arguments[:4], input="\n").stdout == "\n"
    long = CliRunner().invoke(app, ["translate", str(tmp_path / "run"), "--text", "one red cat " * 60])
    assert long.exit_code == 1 and "this model translates up to" in long.output, long.output
    assert metrics["exact"] == sum(b == c for _, b, c in rows) / len(rows)


def test_without_sacrebleu_it_is_said_before_training(pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need the package sacrebleu: pip install sacrebleu"):
        make_task(settings(pairs_file, "decoder", 1))
    make_task(settings(pairs_file, "decoder", 1, val=""))  # nothing to score


def test_the_loss_is_on_the_target_alone() -> None:
    tokenizer = ByteTokenizer()
    loader = PairLoader(encode_pairs(PAIRS, tokenizer, 64), tokenizer, 3, seed=1)
    x, y, starts, longest = loader.next_batch()
    assert longest == (starts[1:] - starts[:-1]).max()
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        text = tokenizer.decode(x[0, begin:end].tolist())
        source, target = text.split("\t")
        assert (source, target) in PAIRS
        assert x[0, begin] == tokenizer.eot
        predicted = y[0, begin:end]
        assert predicted[predicted >= 0].tolist() == [*target.encode(), tokenizer.eot]
        assert (predicted[: len(source) + 1] == -100).all()


def test_batches_of_sources_are_not_padded_and_every_pair_comes_once() -> None:
    tokenizer = ByteTokenizer()
    encoded = encode_pairs(PAIRS, tokenizer, 64)
    loader, again = (SourceLoader(encoded, tokenizer, 4, seed=3) for _ in range(2))
    for epoch in range(2):
        seen = []
        while len(seen) < len(PAIRS):
            batch = loader.next_batch()
            for source, x, y in zip(batch["source"], batch["x"], batch["y"], strict=True):
                target = y[y >= 0].tolist()
                assert x[: len(target)].tolist() == [tokenizer.eot, *target[:-1]]
                seen.append((tokenizer.decode(source.tolist()), tokenizer.decode(target)))
        assert sorted(seen) == sorted(PAIRS), epoch
    again.load_state_dict({**loader.state_dict(), "samples": 3})
    loader.load_state_dict({**loader.state_dict(), "samples": 3})
    assert torch.equal(again.next_batch()["x"], loader.next_batch()["x"])
    total = sum(weight for _, weight in loader.evaluation_batches(100))
    assert total == sum(len(t.encode()) + 1 for _, t in PAIRS)
    few = SourceLoader([([1] * n, [n]) for n in range(1, 41)], tokenizer, 4).evaluation_batches(4)
    assert [batch["source"].shape[1] for batch, _ in few] == [1, 14, 27, 40], "not the shortest ones"


def loaded(path: Path, architecture: str, epochs: float) -> tuple[int, Any]:
    """The steps that so many epochs come to, and the loader of the training pairs."""
    config = settings(path, architecture, 1, epochs=epochs, vocab_size=257)
    task = make_task(config)
    train, _ = task.loaders(task.make_model(), Processes())
    return config.training.steps, train


def test_epochs_are_passes_over_the_pairs(pairs_file: Path) -> None:
    assert loaded(pairs_file, "decoder", 2.0)[0] == 2 * len(PAIRS) / 6
    steps, train = loaded(pairs_file, "encoder-decoder", 2.0)
    assert steps > 2 * len(PAIRS) / 6, "sources of one length: not every batch is full"
    assert sum(len(train.next_batch()["x"]) for _ in range(steps)) == 2 * len(PAIRS)
    for epochs in (-3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"task\.epochs must be at least 0 and finite, got {epochs}"):
            loaded(pairs_file, "decoder", epochs)


def test_batches_by_length_are_resumed_with_their_size_alone() -> None:
    tokenizer = ByteTokenizer()
    encoded = encode_pairs(PAIRS, tokenizer, 64)
    state = SourceLoader(encoded, tokenizer, 4).state_dict()
    with pytest.raises(ValueError, match=r"in epochs of \d+ batches, this loader's have \d+: training\.batch_size"):
        SourceLoader(encoded, tokenizer, 2).load_state_dict(state)
    del state["batches"]  # as before it was written
    SourceLoader(encoded, tokenizer, 4).load_state_dict(state)


def test_every_target_counts_the_same_in_any_batches(tmp_path: Path) -> None:
    """Some targets are four times as long as others: a mean of the batches' means would count the short ones more."""
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b * (1 if i % 3 else 4)}\n" for i, (a, b) in enumerate(PAIRS)))

    def config(architecture: str, batch_size: int, grad_accum: int) -> Any:
        config = settings(path, architecture, 3)
        config.training.batch_size, config.training.grad_accum = batch_size, grad_accum
        return config

    def losses(config: Any) -> list[list[float]]:
        run = tmp_path / f"{config.task['architecture']}-{config.training.batch_size}"
        start_run(config, run, display=quiet(), source=make_task(config))
        return [[r["loss"], r["grad_norm"]] for r in read_journal(run / "log.jsonl") if r["kind"] == "step"]

    for a, b in zip(losses(config("decoder", 6, 1)), losses(config("decoder", 2, 3)), strict=True):
        assert a == pytest.approx(b, rel=1e-4)

    several = config("encoder-decoder", 2, 3)  # an encoder-decoder's batches follow from the size: these three weighed
    task = make_task(several)
    torch.manual_seed(several.training.seed)
    model = task.make_model()
    loader = task.loaders(model, Processes())[0]
    batches = [loader.next_batch() for _ in range(3)]
    weights = [int((batch["y"] >= 0).sum()) for batch in batches]
    assert len(set(weights)) > 1
    total = sum(model(**batch)[1].item() * weight for batch, weight in zip(batches, weights, strict=True))
    assert losses(several)[0][0] == pytest.approx(total / sum(weights), rel=1e-5)


def small() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(GPTConfig(vocab_size=19, block_size=12, n_layer=2, n_head=2, n_embd=16, init_std=0.3)).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(len(shape)))


def test_the_decoder_sees_all_of_the_source_and_none_of_the_future() -> None:
    model, source, x = small(), ids(2, 7), ids(2, 5)
    logits, _ = model(x, source=source)
    for place in range(7):
        changed = source.clone()
        changed[:, place] = (changed[:, place] + 1) % 19
        assert not torch.allclose(model(x, source=changed)[0][:, 0], logits[:, 0])
    future = x.clone()
    future[:, 3] = (future[:, 3] + 1) % 19
    after, _ = model(future, source=source)
    assert torch.equal(after[:, :3], logits[:, :3]) and not torch.allclose(after[:, 3], logits[:, 3])
    y = ids(2, 5, 1)[..., 0]
    _, loss = model(x, y, source=source)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "bias" not in n)


@torch.no_grad()
def test_its_greedy_search_is_the_argmax() -> None:
    model, source = small(), ids(3, 6)
    found = search(Translations(model, source, 18), 3, 8, 17, 1, 0.0)
    for row, hypothesis in enumerate(found):
        x = [18]
        while len(x) < 9:
            token = int(model(torch.tensor([x]), source=source[row : row + 1])[0][0, -1].argmax())
            x.append(token)
            if token == 17:
                break
        assert hypothesis.tokens == [t for t in x[1:] if t != 17]


def test_a_folder_keeps_every_bit(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "m")
    again = EncoderDecoder.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_bad_input(pairs_file: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"architecture": "rnn"}, "must be one of decoder, encoder-decoder, got 'rnn'"),
        ({"train": ""}, r"task\.train is missing"),
        ({"beams": 0}, "beams must be from 1 to half of the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"architecture": "encoder-decoder", "model": str(tmp_path)}, "begins with new weights: give 'new'"),
        ({"target_column": "2"}, r"pairs\.tsv:1 has 2 columns separated by tabs, wanted 3: 'one red cat"),
    ):
        config = settings(pairs_file, "decoder", 1)
        config.task.update(changes)
        config.model = {} if "model" in changes else config.model
        with pytest.raises(ValueError, match=message):
            finetune(config, tmp_path / "run", display=quiet())
        assert not (tmp_path / "run").exists()
    config = settings(pairs_file, "decoder", 1)
    config.lora.rank = 2
    with pytest.raises(ValueError, match=r"a new model has none, and lora\.rank is 2"):
        finetune(config, tmp_path / "run", display=quiet())
    (tmp_path / "half.tsv").write_text("a\tb\nonly one side\n")
    with pytest.raises(ValueError, match=r"half\.tsv:2 has 1 column separated by tabs, wanted 2"):
        read_pairs(str(tmp_path / "half.tsv"), TranslationSettings())
    (tmp_path / "empty.tsv").write_text("a\t \n")
    with pytest.raises(ValueError, match="pair 1 has an empty side"):
        read_pairs(str(tmp_path / "empty.tsv"), TranslationSettings())
    with pytest.raises(ValueError, match="wanted one reference for each translation, got 1 for 2"):
        score_translations(["a", "b"], ["a"])
    model = small()
    for call, message in (
        (lambda: model(ids(1, 13), source=ids(1, 3)), "x has 13 tokens, block_size is 12"),
        (lambda: model(ids(1, 3), source=ids(1, 13)), "source has 13 tokens"),
        (lambda: EncoderDecoder(GPTConfig(position="rotary")), "has position='learned', got 'rotary'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["x", "source"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.full((1, 3), 19), "holds the token id 19; this model knows 0 to 18"),
        (torch.full((1, 3), -1), "holds the token id -1; this model knows 0 to 18"),
        (torch.zeros(1, 3), "must be int64 or int32 token ids, got torch.float32"),
        (torch.zeros(1, 3, dtype=torch.bool), "must be int64 or int32 token ids, got torch.bool"),
        (torch.zeros(3, dtype=torch.int64), r"must have shape \(B, T\) with at least one token, got \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"must have shape \(B, T\) with at least one token, got \(1, 0\)"),
    ],
)
def test_bad_ids(name: str, wrong: torch.Tensor, message: str) -> None:
    given = {"x": ids(1, 3), "source": ids(1, 3), name: wrong}
    with pytest.raises(ValueError, match=f"{name} {message}"):
        small()(given["x"], source=given["source"])


def test_tatoebas_pairs_are_read(data: Path) -> None:
    pairs = read_pairs(str(data / "translation" / "tatoeba.eng-fra.valid.tsv"), TranslationSettings())
    assert len(pairs) == 1000 and all(a and b for a, b in pairs)
