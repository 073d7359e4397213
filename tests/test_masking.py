"""Masked prediction: what is left out, how often, as what; and training by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch

import fastlm
from fastlm.data import ByteTokenizer, CharTokenizer, MaskedLoader, Masker, TokenData, WindowLoader
from fastlm.data.bpe import BPETokenizer
from fastlm.training import resume_run, start_run
from fastlm.training.config import MaskingConfig, config_from_dict
from fastlm.training.journal import read_journal
from tests.training_runs import SENTENCE, one_thread, quiet, tiny_config, write_tiny_dataset

__all__ = ["one_thread"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masker(**rules) -> Masker:
    return Masker.make(CharTokenizer(SENTENCE), MaskingConfig(**rules), mask_id=29)


def rows(count: int = 400) -> torch.Tensor:
    tokenizer = CharTokenizer(SENTENCE)
    ids = torch.tensor(tokenizer.encode(SENTENCE * 3)[:100])
    ids[50] = tokenizer.eot
    return ids.expand(count, 100)


def test_rates_and_what_stands_in_the_place():
    ids = rows()
    x, y = masker()(ids, generator())
    chosen = y != -100
    assert (chosen.sum(1) == 15).all()  # 15 % of 99 ordinary tokens, in every row
    assert not chosen[:, 50].any(), "the end of a document is never left out"
    assert torch.equal(y[chosen], ids[chosen]) and torch.equal(x[~chosen], ids[~chosen])
    masked, same = x[chosen] == 29, x[chosen] == ids[chosen]
    assert abs(masked.double().mean() - 0.8) < 0.02
    assert abs(same.double().mean() - 0.1 - 0.1 / 28) < 0.015  # a random one of 28 characters may be the same
    assert x[chosen & (x != 29)].max() < 28, "another token is an ordinary one"
    places = chosen.double().mean(0)
    assert (places[torch.arange(100) != 50] > 0.05).all(), "every place has its turn"


def test_the_masks_are_a_function_of_the_seed():
    first, again, other = (masker()(rows(4), generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_a_short_row_has_a_target_and_options_count():
    _, y = masker(rate=0.01)(rows(3)[:, :4], generator())
    assert ((y != -100).sum(1) == 1).all()
    x, y = masker(rate=0.5, mask=0.0, random=0.0)(rows(3), generator())
    assert torch.equal(x, rows(3)) and (y != -100).any()
    x, y = masker(mask=1.0, random=0.0)(rows(3), generator())
    assert (x[y != -100] == 29).all()


def whole_words(chosen: torch.Tensor, words: list[int]) -> None:
    """All tokens of a word are chosen, or none."""
    for row in chosen:
        for word in set(words):
            members = [bool(row[i]) for i, w in enumerate(words) if w == word]
            assert all(members) or not any(members), (word, members)


def test_whole_words_of_characters():
    ids = rows(50)[:, :44]
    _, y = masker(whole_word=True)(ids, generator())
    text = SENTENCE[:44]
    words, number = [], 0
    for i, c in enumerate(text):
        if i and (not c.isalnum() or not text[i - 1].isalnum()):
            number += 1
        words.append(number)
    # a space belongs to the word after it in byte-level BPE; here it is a token of its own that begins and ends one
    whole_words(y != -100, words)
    counts = (y != -100).sum(1)
    assert counts.max() <= 7 and counts.min() >= 1


def test_whole_words_of_word_pieces_and_byte_pairs(data: Path):
    vocab = {
        w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##believ", "##able", "a", "story"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
    tokenizer = BPETokenizer(backend)
    rules = MaskingConfig(whole_word=True, rate=0.5)
    pieces = Masker.make(tokenizer, rules, None)
    assert pieces.mask_id == 3
    ids = torch.tensor([1, 7, 4, 5, 6, 8, 2]).expand(60, 7)
    _, y = pieces(ids, generator())
    assert not (y[:, [0, 6]] != -100).any(), "[CLS] and [SEP] stay"
    whole_words(y != -100, [0, 1, 2, 2, 2, 3, 4])
    assert (y[:, 2] != -100).any() and (y[:, 1] != -100).any()

    gpt2 = fastlm.data.load_tokenizer(data / "gpt2")
    text = "The unbelievableness of antidisestablishmentarianism, however, is well-known."
    ids = torch.tensor(gpt2.encode(text))
    table = Masker.make(gpt2, rules, gpt2.vocab_size).words
    begins = [gpt2.decode([i]) for n, i in enumerate(ids.tolist()) if n == 0 or table[0, i] or table[1, ids[n - 1]]]
    assert begins == ["The", " unbeliev", " of", " ant", ",", " however", ",", " is", " well", "-", "known", "."]


def test_the_loader_is_exact_and_dynamic(tmp_path):
    data = TokenData.open(write_tiny_dataset(tmp_path))
    rules = Masker.make(CharTokenizer(SENTENCE), MaskingConfig(), 29)

    def loader(**options) -> MaskedLoader:
        return MaskedLoader(WindowLoader(data, 4, 16, seed=3, **options), rules)

    one, two = loader(), loader()
    batches = [one.next_batch() for _ in range(5)]
    two.load_state_dict({**two.state_dict(), "samples": 12})
    assert all(torch.equal(a, b) for a, b in zip(two.next_batch(), batches[3], strict=True))
    assert not torch.equal(batches[0][1] == -100, batches[1][1] == -100)
    halves = [loader(rank=r, world_size=2) for r in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(halves[1].next_batch(), batches[1], strict=True))
    assert [one.weight(batch) for batch in batches] == [int((y != -100).sum()) for _, y in batches]
    first, again = list(one.evaluation_batches(6)), list(one.evaluation_batches(6))
    assert sum(w for _, w in first) == sum(int((y != -100).sum()) for (_, y), _ in first)
    assert all(torch.equal(a[0][1], b[0][1]) for a, b in zip(first, again, strict=True))


def masked_config(dataset: Path, **sections):
    training = {"objective": "masked", **sections.pop("training", {})}
    return tiny_config(dataset, training=training, **sections)


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_journal(run / "log.jsonl") if r["kind"] == "step"]


def test_training_learns(tmp_path, one_thread):
    dataset = write_tiny_dataset(tmp_path / "data")
    model = {"n_embd": 32, "dropout": 0.0, "block_size": 32}
    training = {"steps": 80, "grad_accum": 1, "batch_size": 8}
    config = masked_config(dataset, model=model, training=training, checkpoint={"every": 0}, evaluation={"every": 0})
    result = start_run(config, tmp_path / "run", display=quiet())
    first, last = losses(tmp_path / "run")[:5], losses(tmp_path / "run")[-20:]
    assert sum(last) / 20 < sum(first) / 5 - 0.2
    assert result.val_loss is not None and result.val_loss < 3.2  # ln 29 = 3.37 is knowing nothing
    records = read_journal(tmp_path / "run" / "log.jsonl")
    assert all("bits_per_byte" not in r for r in records if r["kind"] == "eval")


def test_resuming_is_exact(tmp_path, one_thread):
    dataset = write_tiny_dataset(tmp_path / "data")
    options = {"masking": {"whole_word": True}, "checkpoint": {"every": 0}, "evaluation": {"every": 0}}

    def config(steps: int):
        return masked_config(dataset, training={"steps": steps, "schedule": "constant"}, **options)

    start_run(config(6), tmp_path / "a", display=quiet())
    resume_run(tmp_path / "a", overrides=("training.steps=12",), display=quiet())
    start_run(config(12), tmp_path / "b", display=quiet())
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 12


def test_the_model_knows_its_mask(tmp_path, one_thread):
    from fastlm.tasks.fill import fill_blanks
    from fastlm.tasks.pretrained import open_pretrained

    dataset = write_tiny_dataset(tmp_path / "data")
    start_run(masked_config(dataset, training={"steps": 2}), tmp_path / "run", display=quiet())
    weights, tokenizer = open_pretrained(tmp_path / "run")
    model = fastlm.Encoder.from_pretrained(weights)
    assert model.config.mask_token_id == tokenizer.vocab_size == 29 and model.config.vocab_size == 30
    guesses, text = fill_blanks(model, tokenizer, "the ___ brown f[MASK]x", top=3)
    assert [len(row) for row in guesses] == [3, 3] and len(text) == len("the? brown f?x")
    assert all(0 < g.probability < 1 for row in guesses for g in row)
    for bad, message in (("no gap", "there is no blank"), ("___" + " the" * 10, "the model reads 16")):
        with pytest.raises(ValueError, match=message):
            fill_blanks(model, tokenizer, bad)


def test_bad_settings(tmp_path):
    dataset = write_tiny_dataset(tmp_path / "data")
    for sections, message in (
        ({"masking": {"rate": 0.0}}, "masking.rate must be above 0"),
        ({"masking": {"mask": 0.8, "random": 0.3}}, r"masking.mask \+ masking.random at most 1"),
        ({"model": {"position": "rotary"}}, r"unknown key model.position .*there are: preset, vocab_size"),
        ({"training": {"objective": "mask"}}, "training.objective must be one of causal, masked"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_config(dataset, **sections)
    with pytest.raises(ValueError, match=r"this model \(Encoder\) does not continue texts"):
        start_run(masked_config(dataset, evaluation={"sample_every": 5}), tmp_path / "run", display=quiet())
    config = masked_config(dataset, model={"vocab_size": 29})
    with pytest.raises(ValueError, match="smaller than the tokenizer's vocabulary of 29 and the mask"):
        start_run(config, tmp_path / "run", display=quiet())
    with pytest.raises(ValueError, match="neither the model"):
        Masker.make(ByteTokenizer(), MaskingConfig(), None)
    assert config_from_dict({"training": {"objective": "masked"}, "model": {"preset": "bert-base"}})
