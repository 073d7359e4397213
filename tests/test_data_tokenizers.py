"""Tokenizers: the interface, GPT-2's ids, incremental decoding, saving, fingerprints."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

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


def test_a_published_vocabulary_begins_texts_by_its_own_rules(tokenizer: Tokenizer) -> None:
    assert tokenizer.begin == [tokenizer.eot]
    tokenizer.begin_as_published()
    assert tokenizer.begin == [tokenizer.eot]  # they say nothing

    backend = small_bpe().backend
    backend.add_special_tokens(["<s>"])
    special = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    llama = BPETokenizer(backend)
    assert llama.begin == [llama.eot]
    llama.begin_as_published()
    assert llama.begin == [special[0][1]] and special[0][1] not in llama.encode("<s>a")


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


class TestTiktoken:
    @pytest.fixture
    def ranks(self, tmp_path: Path) -> Path:
        """A vocabulary of the bytes and a few merges, as tiktoken writes it."""
        pytest.importorskip("tiktoken")
        tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w"]
        lines = [base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(tokens)]
        path = tmp_path / "gpt2.tiktoken"
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    def test_ranks_are_a_tokenizer(self, ranks: Path, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(str(ranks))
        assert tokenizer.encode("hello world") == [259, 260, *b"orld"]
        assert (tokenizer.eot, tokenizer.vocab_size, tokenizer.dtype) == (50256, 50257, np.uint16)
        tokenizer.save(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved")
        assert again.fingerprint == tokenizer.fingerprint
        for text in TEXTS:
            ids = again.encode(text)
            assert again.decode(ids) == text
            assert again.encode_batch([text])[0].tolist() == ids
            stream = again.stream()
            assert "".join(map(stream.push, ids)) + stream.flush() == text
        assert again.decode([*again.encode("he"), 50256, 1000]) == "he"

    def test_gpt2s_ranks_give_gpt2s_ids(self, data: Path, tmp_path: Path) -> None:
        load = pytest.importorskip("tiktoken.load")
        ranks = load.data_gym_to_mergeable_bpe_ranks(str(data / "gpt2/vocab.bpe"), str(data / "gpt2/encoder.json"))
        lines = [base64.b64encode(t) + b" " + str(i).encode() for t, i in ranks.items()]
        (tmp_path / "gpt2.tiktoken").write_bytes(b"\n".join(lines))
        ours, theirs = make_tokenizer(str(tmp_path / "gpt2.tiktoken")), load_tokenizer(data / "gpt2")
        text = (data / "text" / "tinyshakespeare.txt").read_text()[:100_000]
        for sample in ("Hello world", text, *TEXTS, "  two  spaces\n\n\tand 12345's end "):
            assert ours.encode(sample) == theirs.encode(sample)

    def test_bad_ranks_are_named(self, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="tiktoken has no encoding 'gpt9'"):
            make_tokenizer("tiktoken:gpt9")
        ranks.rename(tmp_path / "mine.tiktoken")
        with pytest.raises(ValueError, match=r"known only for gpt2\.tiktoken"):
            make_tokenizer(str(tmp_path / "mine.tiktoken"))
        for content, message in (
            (b"AA== 0\n?? 1", r"gpt2\.tiktoken:2 is not a token"),
            (b"AA== 0", "lack the byte 0x01"),
        ):
            ranks.write_bytes(content)
            with pytest.raises(ValueError, match=message):
                make_tokenizer(str(ranks))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install tiktoken"):
            make_tokenizer("tiktoken:gpt2")
