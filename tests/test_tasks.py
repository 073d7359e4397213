"""Fine-tuning: to classes and to a text, on causal and masked models, in full and by LoRA; tables; bad input."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import fastlm
from fastlm.cli import app
from fastlm.data import CharTokenizer
from fastlm.data.examples import ExampleLoader
from fastlm.data.tables import read_table
from fastlm.evaluation.classes import plot_confusion, score_classes
from fastlm.models.classifier import Classifier, ClassifierConfig
from fastlm.nn.packing import pool
from fastlm.tasks.classification import ClassificationSettings, class_weights, predict, split_examples
from fastlm.tasks.registry import DEFAULTS, finetune
from fastlm.training.config import load_config
from fastlm.training.journal import read_journal
from tests.training_runs import SENTENCE, one_thread, quiet

__all__ = ["one_thread"]

LETTERS = CharTokenizer(SENTENCE)


def save_model(folder: Path, kind: str) -> Path:
    """A tiny untrained model with a tokenizer of characters."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 24}
    if kind == "masked":
        config = fastlm.EncoderConfig(vocab_size=30, mask_token_id=29, **sizes)
        fastlm.Encoder(config).save_pretrained(folder, format="fastlm")
    else:
        fastlm.GPT(fastlm.GPTConfig(vocab_size=29, **sizes)).save_pretrained(folder)
    LETTERS.save(folder)
    return folder


def write_examples(file: Path, count: int = 120, seed: int = 0) -> Path:
    """Texts of 3 to 20 letters: "fox" where they hold an x, else "dog"."""
    generator = np.random.default_rng(seed)
    lines = ["label\ttext"]
    for i in range(count):
        text = "".join(generator.choice(list("abcdehox"[: 7 + i % 2]), generator.integers(3, 20)))
        lines.append(f"{'fox' if 'x' in text else 'dog'}\t{text}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def settings(model: Path, train: Path, *overrides: str):
    """One pass over the examples takes some steps of a tiny model."""
    base = (f"task.model='{model}'", f"task.train='{train}'", "task.name=classification", "training.lr=1e-2")
    return load_config(None, [*base, "training.warmup_steps=2", "training.device=cpu", *overrides], DEFAULTS)


@pytest.mark.parametrize(("kind", "lora"), [("masked", 0), ("causal", 0), ("masked", 4)])
def test_classification_learns_and_is_used(kind, lora, tmp_path, one_thread):
    model, train = save_model(tmp_path / "model", kind), write_examples(tmp_path / "x.tsv")
    config = settings(
        model, train, "task.epochs=10", "task.test_fraction=0.25", f"lora.rank={lora}", "lora.targets=all",
        "task.class_weights=balanced", "task.pooling=mean", "evaluation.every=5",
    )  # fmt: skip
    result, metrics = finetune(config, tmp_path / "run", display=quiet())
    assert result.step == -(-10 * 81 // 32)  # 120 - 30 for the test - a tenth of the rest
    assert metrics["split"] == "test" and metrics["examples"] == 30
    assert metrics["accuracy"] > 0.8 and metrics["macro_f1"] > 0.75
    low, high = metrics["accuracy_interval"]
    assert low <= metrics["accuracy"] <= high
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["confusion"] == metrics["confusion"]

    out = CliRunner().invoke(app, ["classify", str(tmp_path / "run"), "--text", "abxxxab", "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.output)["label"] == "fox"
    out = CliRunner().invoke(app, ["classify", str(tmp_path / "run"), "--data", str(train), "--json"])
    assert json.loads(out.output)["accuracy"] > 0.8
    if lora:  # the model itself is what it was
        checkpoint = next((tmp_path / "run" / "checkpoints").glob("step-*"))
        base = Classifier.from_pretrained(checkpoint / "model").backbone
        before = fastlm.Encoder.from_pretrained(model)
        for name, p in before.named_parameters():
            assert torch.equal(base.get_parameter(name), p), name


def test_the_metrics_do_not_depend_on_the_picture(tmp_path, one_thread, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no colours left")

    monkeypatch.setattr("fastlm.tasks.classification.plot_confusion", fail)
    model, train = save_model(tmp_path / "model", "masked"), write_examples(tmp_path / "x.tsv", 20)
    display = quiet()
    with display.console.capture() as shown:
        display.console.quiet = False
        _, metrics = finetune(settings(model, train, "training.steps=1"), tmp_path / "run", display=display)
    assert "could not be drawn: RuntimeError: no colours left" in shown.get()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"] == metrics["accuracy"]


def test_a_text_is_learned_on(tmp_path, one_thread):
    for kind, rank in (("causal", 2), ("masked", 0)):
        model = save_model(tmp_path / kind, kind)
        (tmp_path / "text.txt").write_text(SENTENCE * 40)
        arguments = ["finetune", str(model), "--task", "text", "--train", str(tmp_path / "text.txt"), "--lora-rank",
                     str(rank), "--out", str(tmp_path / f"{kind}-run"), "--set", "training.steps=20", "--set",
                     "training.lr=1e-2", "--set", "training.batch_size=4", "--set", "evaluation.every=5"]  # fmt: skip
        out = CliRunner().invoke(app, arguments)
        assert out.exit_code == 0, out.output
        metrics = json.loads((tmp_path / f"{kind}-run" / "metrics.json").read_text())
        assert metrics["best_val_loss"] < metrics["first_val_loss"]
    out = CliRunner().invoke(
        app, ["generate", str(tmp_path / "causal-run"), "--prompt", "the", "--max-new-tokens", "3"]
    )
    assert out.exit_code == 0, out.output
    out = CliRunner().invoke(app, ["fill", str(tmp_path / "masked-run"), "the qu___ck"])
    assert out.exit_code == 0 and out.output.startswith("the qu"), out.output
    out = CliRunner().invoke(app, ["generate", str(tmp_path / "masked-run"), "--prompt", "the"])
    assert out.exit_code == 1 and "a causal one is wanted here" in out.output
    out = CliRunner().invoke(app, ["fill", str(tmp_path / "causal-run"), "the ___"])
    assert out.exit_code == 1 and "fastlm.Encoder loads" in out.output


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling(pooling):
    hidden = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    parts = [hidden[0, a:b] for a, b in ((0, 4), (4, 5), (5, 9))]
    take = {"mean": lambda p: p.mean(0), "first": lambda p: p[0], "last": lambda p: p[-1]}[pooling]
    torch.testing.assert_close(pool(hidden, starts, pooling), torch.stack([take(p) for p in parts]))
    assert torch.autograd.gradcheck(lambda h: pool(h, starts, pooling), (hidden,))


def test_a_classifier_packed_and_one_by_one(tmp_path):
    backbone = fastlm.Encoder.from_pretrained(save_model(tmp_path / "model", "masked"))
    config = ClassifierConfig(("a", "b", "c"), "mean", 0.0, (1.0, 2.0, 0.5))
    model = Classifier(backbone, config).eval()
    texts = ["the", "quick brown fox", "o", "dog dog"]
    together = predict(model, LETTERS, texts, batch_size=4)
    alone = torch.cat([predict(model, LETTERS, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    idx, labels = torch.randint(0, 28, (4, 7)), torch.tensor([0, 1, 2, 1])
    logits, loss = model(idx, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 2.0, 0.5])))
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    assert again.config == config and torch.equal(again(idx)[0], logits)


def test_batches_of_examples():
    sequences = [[i] * (1 + i % 5) for i in range(10)]

    def loader(**part) -> ExampleLoader:
        return ExampleLoader(sequences, list(range(10)), 5, seed=1, **part)

    one = loader()
    epochs = [torch.cat([one.next_batch()[1] for _ in range(2)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    x, y, starts, longest = one.next_batch()
    assert [x[0, a:b].tolist() for a, b in itertools.pairwise(starts.tolist())] == [sequences[i] for i in y]
    assert longest == max(len(sequences[i]) for i in y) and starts.dtype == torch.int32
    parts = [loader(rank=r, world_size=2).next_batch()[1].tolist() for r in (0, 1)]
    assert parts[0] + parts[1] == epochs[0]
    two = loader()
    two.load_state_dict({**two.state_dict(), "samples": 5})
    assert two.next_batch()[1].tolist() == epochs[0][5:]
    batches = list(one.evaluation_batches(7))
    assert [w for _, w in batches] == [5, 2]
    assert [y.tolist() for (_, y, _, _), _ in batches] == [[0, 1, 3, 4, 6], [7, 9]], "from all of the split"
    assert sum(w for _, w in one.evaluation_batches(10**12)) == 10
    assert one.weight(one.next_batch()) is None  # all are of one size
    weighted = loader(class_weights=[float(i) for i in range(10)])
    assert weighted.weight(weighted.next_batch()) == sum(epochs[0][:5])
    assert [w for _, w in weighted.evaluation_batches(7)] == [0 + 1 + 3 + 4 + 6, 7 + 9]


def test_class_weights_count_the_same_in_any_batches(tmp_path, one_thread):
    """The losses of training and validation are means over all examples by their weights, however they are cut."""
    model, train = save_model(tmp_path / "model", "masked"), write_examples(tmp_path / "x.tsv", 60)
    records = []
    for batch_size, grad_accum in ((8, 1), (2, 4)):
        config = settings(
            model, train, f"training.batch_size={batch_size}", f"training.grad_accum={grad_accum}", "training.steps=4",
            "task.class_weights='1.0,7.0'", "task.val_fraction=0.3", "task.dropout=0.0", "task.head_dropout=0.0",
            "evaluation.every=2",
        )  # fmt: skip
        finetune(config, tmp_path / f"run-{batch_size}", display=quiet())
        journal = read_journal(tmp_path / f"run-{batch_size}" / "log.jsonl")
        kept = ("step", "loss", "grad_norm", "val_loss")
        records.append([[r[k] for k in kept if k in r] for r in journal if r["kind"] in ("step", "eval")])
    assert len(records[0]) == len(records[1]) == 6
    for a, b in zip(*records, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_scores(tmp_path):
    score = score_classes([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], ("a", "b", "c"))
    assert score.accuracy == pytest.approx(4 / 6)
    assert score.confusion == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert score.macro_f1 == pytest.approx((2 * 2 / (4 + 1 + 1) + 2 * 2 / (4 + 1) + 0) / 3)
    assert score.macro_f1_interval[0] <= score.macro_f1 <= score.macro_f1_interval[1]
    certain = score_classes([0] * 9 + [1], [0] * 9 + [1], ("a", "b"))
    assert certain.macro_f1_interval == (1.0, 1.0)  # a resample without a "b" has no F1 of it
    for labels in (score.labels, ("$_$", "$100 - $200", "C$^")):  # dollars are no formula
        plot_confusion(replace(score, labels=labels), tmp_path / "c.png", title="$_$")
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert class_weights("balanced", ["a", "a", "a", "b"], ("a", "b")) == pytest.approx((4 / 6, 2.0))
    assert class_weights("1,3.5", ["a", "b"], ("a", "b")) == (1.0, 3.5)


def test_equal_texts_stay_on_one_side(tmp_path):
    rows = ["label\ttext"] + [f"{i % 2}\ttext {i % 50}" for i in range(100)]
    (tmp_path / "x.tsv").write_text("\n".join(rows))
    split = split_examples(
        ClassificationSettings(train=str(tmp_path / "x.tsv"), test_fraction=0.2, val_fraction=0.1, split_seed=3)
    )
    texts = [{text for text, _ in part} for part in split]
    assert [len(part) for part in split] == [72, 8, 20]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_tables(tmp_path):
    files = {
        "a.tsv": 'label\ttext\n1\tsays "no"\n\n0\té, yes\n',
        "a.csv": 'text,label\n"says ""no""",1\n"é, yes",0\n',
        "a.jsonl": '{"text": "says \\"no\\"", "label": 1}\n{"text": "é, yes", "label": 0, "more": null}\n',
    }
    for name, content in files.items():
        for mark in ("", "\ufeff"):
            (tmp_path / name).write_text(mark + content, encoding="utf-8")
            assert read_table(tmp_path / name, ("text", "label")) == [('says "no"', "1"), ("é, yes", "0")], name
    for name, content, message in (
        ("b.tsv", "label\ttexts\n1\ta\n", r"no column 'text' \(did you mean 'texts'\?\); it has: label, texts"),
        ("b.tsv", "label\ttext\n1\n", r"b.tsv:2: 1 fields, the first line names 2 columns \(label, text\)"),
        ("b.tsv", "label\ttext\n", "has no rows"),
        ("b.tsv", "", "no column 'text'; it has: none"),
        ("b.jsonl", '{"text": "a"}\n', r"b.jsonl:1: there is no column 'label'"),
        ("b.jsonl", "{\n", "b.jsonl:1: not JSON"),
        ("b.jsonl", '{"text": null, "label": 1}\n', "text must be a string or a number, got None"),
        ("b.txt", "a", "wanted a file of one of the formats .tsv, .csv, .jsonl"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name, ("text", "label"))
    long = "a" * 300_000
    (tmp_path / "long.tsv").write_text(f"label\ttext\n1\t{long}\n")
    assert read_table(tmp_path / "long.tsv", ("text", "label")) == [(long, "1")]
    (tmp_path / "c.csv").write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_table(tmp_path / "c.csv", ("text", "label"))


def test_bad_input(tmp_path, one_thread):
    model, train = save_model(tmp_path / "model", "masked"), write_examples(tmp_path / "x.tsv", 20)
    (tmp_path / "other.tsv").write_text("label\ttext\ncat\tmiau\n")
    (tmp_path / "one.tsv").write_text("label\ttext\ncat\ta\ncat\tb\n")
    (tmp_path / "empty.tsv").write_text("label\ttext\ncat\t \n")
    for overrides, message in (
        (["evaluation.sample_every=2"], r"this model \(Classifier\) does not continue texts"),
        (["model.n_layer=3"], r"model.n_layer has no meaning here"),
        (["training.objective=masked"], r"training.objective has no meaning here"),
        (["data.path=x"], r"data.path has no meaning here.* its data are task.train"),
        (["task.labels='dog,fox,cat'"], r"no training example has the label 'cat'; there are: 'dog' \(\d+\), 'fox'"),
        (["task.labels='dog,cat'"], "the label 'fox' of '.*' is not among the classes: 'dog', 'cat'"),
        ([f"task.test='{tmp_path / 'other.tsv'}'"], "other.tsv: the label 'cat' of 'miau' is not among the classes"),
        ([f"task.train='{tmp_path / 'one.tsv'}'"], "all 2 training examples have the label 'cat'"),
        ([f"task.train='{tmp_path / 'empty.tsv'}'"], "example 1 has an empty text"),
        (["task.text_column=sentence"], "there is no column 'sentence'; it has: label, text"),
        (["task.class_weights='1,2,3'"], "has 3 numbers for 2 classes"),
        (["task.class_weights='1,inf'"], "wanted a positive, finite weight for each of the 2 classes"),
        (["task.class_weights=most"], "must be none, balanced, or numbers"),
        (["task.test_fraction=1.0"], "must be at least 0 and less than 1"),
        (["task.test_fraction=0.99", "task.val_fraction=0.99"], "leave no example to train on"),
        (["task.pooling=max"], "pooling must be one of mean, first, last"),
        (["task.epoch=2"], r"unknown key task.epoch \(did you mean 'epochs'\?\)"),
        (["task.name=clasification"], r"no task 'clasification' \(did you mean 'classification'\?\)"),
        (["task.model=''"], "task.model is missing"),
        (["task.train=''"], "task.train is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(settings(model, train, *overrides), tmp_path / "run", display=quiet())
        assert not (tmp_path / "run").exists()
    finetune(settings(model, train, "training.steps=1", "task.val_fraction=0"), tmp_path / "run", display=quiet())
    with pytest.raises(ValueError, match="holds a fastlm-classifier, made for its own task; wanted a pretrained model"):
        finetune(settings(tmp_path / "run", train), tmp_path / "again", display=quiet())
    for arguments, message in (
        (["classify", str(tmp_path / "run"), "--data", str(tmp_path / "other.tsv")], "other.tsv: the label 'cat'"),
        (["classify", str(tmp_path / "run"), "--text", " "], "an empty text has no class"),
        (["finetune", str(model), "--out", str(tmp_path / "new"), "--train", str(train)], "task.name is missing"),
        (["translate", str(tmp_path / "run"), "--text", "a"], "is a run of classification, wanted one of"),
    ):
        out = CliRunner().invoke(app, arguments)
        assert out.exit_code == 1 and message in out.output, out.output
    out = CliRunner().invoke(app, ["classify", str(model), "--text", "a"])
    assert out.exit_code == 1 and "wanted a fastlm-classifier" in out.output
    out = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert out.exit_code == 1 and "fastlm finetune --resume" in out.output
    out = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), "--prompt", "a"])
    assert out.exit_code == 1 and "fastlm-classifier" in out.output
    CharTokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL. ").save(model)
    with pytest.raises(ValueError, match="do not belong together"):
        finetune(settings(model, train), tmp_path / "mixed", display=quiet())
