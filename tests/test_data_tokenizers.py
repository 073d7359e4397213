"""Tokenizers: the interface, GPT-2's ids, incremental decoding, saving, fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, make_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界! 👩‍💻\n\n\tend  ", "aaaa bbbb aaaa bbbb\n" * 5]


def small_bpe(vocab_size: int = 300) -> BPETokenizer:
    return BPETokenizer.train(TEXTS * 3, vocab_size)


@pytest.fixture(params=["bytes", "chars", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return {"bytes": ByteTokenizer, "chars": lambda: CharTokenizer.train(TEXTS), "bpe": small_bpe}[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_decode_is_the_inverse_of_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot for i in ids)
    assert tokenizer.encode_batch([text, ""])[0].tolist() == ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_text_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.flush() == text
    assert not any("\ufffd" in part for part in parts)


def test_a_stream_ends_an_incomplete_character() -> None:
    for tokenizer in (ByteTokenizer(), small_bpe()):
        stream = tokenizer.stream()
        ids = tokenizer.encode("語")
        shown = "".join(stream.push(i) for i in ids[:-1])
        assert shown + stream.flush() == "\ufffd"


def test_a_stream_does_not_wait_forever_for_bytes_that_are_no_character() -> None:
    stream = small_bpe().stream()
    lone = small_bpe().backend.token_to_id("Ģ")  # a continuation byte of UTF-8
    text = "".join(stream.push(lone) for _ in range(20))
    assert "\ufffd" in text


@given(st.text())
def test_bytes_encode_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_ordinary_characters() -> None:
    tokenizer = small_bpe()
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_save_and_load_keep_ids_and_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab_size, again.eot) == (tokenizer.vocab_size, tokenizer.eot)
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_fingerprints_tell_vocabularies_apart() -> None:
    prints = {
        t.fingerprint for t in (ByteTokenizer(), CharTokenizer("ab"), CharTokenizer("abc"), small_bpe(), small_bpe(280))
    }
    assert len(prints) == 5
    assert len(ByteTokenizer().fingerprint) == 64


def test_ids_need_two_bytes_up_to_65536_of_them() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.dtype.itemsize == 2
    tokenizer.vocab_size = 65537  # type: ignore[misc]
    assert tokenizer.dtype.itemsize == 4


def test_an_unknown_character_is_named() -> None:
    tokenizer = CharTokenizer("abc")
    for text, position in (("abz", 2), ("b世", 1), ("🙂", 0)):
        with pytest.raises(ValueError, match=rf"{text[position]}.*position {position} "):
            tokenizer.encode(text)


def test_bad_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")
    with pytest.raises(ValueError, match="at least 257"):
        BPETokenizer.train(TEXTS, 100)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        make_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "fastlm_tokenizer.json").write_text(json.dumps({"kind": "runes"}))
    with pytest.raises(ValueError, match="runes"):
        load_tokenizer(tmp_path)


def test_gpt2_files_under_both_names(tmp_path: Path) -> None:
    tokenizer = small_bpe()
    tokenizer.backend.model.save(str(tmp_path))  # vocab.json, merges.txt
    first = load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    second = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert first.encode(text) == second.encode(text) == tokenizer.encode(text)
    assert first.eot == second.eot == tokenizer.eot


def test_gpt2_ids(data: Path) -> None:
    tokenizer = load_tokenizer(data / "gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.eot == 50256
