"""Shards, documents, `prepare`, and the standard library's corpus."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlm.data import ByteTokenizer, Document, TokenData, dataset_tokenizer, load_tokenizer, stdlib_documents
from fastlm.data import documents as documents_module
from fastlm.data.documents import ReadReport, find_files, read_documents
from fastlm.data.pipeline import PrepareOptions, prepare_files
from fastlm.data.prepare import split_by_document, split_tail, write_dataset
from fastlm.data.shards import HEADER_BYTES, ShardWriter, map_shard, read_header
from tests.test_data_tokenizers import small_bpe
from tests.training_runs import file_size_limit


def write_shard(path: Path, documents: list[str]) -> None:
    tokenizer = ByteTokenizer()
    with ShardWriter(path, tokenizer) as writer:
        for text in documents:
            writer.write(tokenizer.encode_batch([text])[0], len(text.encode()))
            writer.end_document()


def all_ids(folder: Path, split: str) -> np.ndarray:
    return np.concatenate(TokenData.open(folder, split).arrays)


class TestShards:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "a.tokens", ["ab", "c"])
        header = read_header(tmp_path / "a.tokens")
        assert (header.tokens, header.documents, header.text_bytes) == (5, 2, 3)
        assert (header.vocab_size, header.eot) == (257, 256)
        assert header.fingerprint == ByteTokenizer().fingerprint
        assert map_shard(tmp_path / "a.tokens").tolist() == [97, 98, 256, 99, 256]

    @pytest.mark.parametrize("cut", [3, HEADER_BYTES - 1, HEADER_BYTES + 3])
    def test_a_truncated_shard_is_refused(self, tmp_path: Path, cut: int) -> None:
        write_shard(tmp_path / "a.tokens", ["abc"])
        os.truncate(tmp_path / "a.tokens", cut)
        with pytest.raises(ValueError, match=r"a\.tokens is (not a fastlm token shard|truncated)"):
            map_shard(tmp_path / "a.tokens")

    def test_a_foreign_or_newer_or_longer_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tokens"
        path.write_bytes(bytes(1000))
        with pytest.raises(ValueError, match="not a fastlm token shard"):
            map_shard(path)
        write_shard(path, ["abc"])
        raw = bytearray(path.read_bytes())
        path.write_bytes(raw + b"xx")
        with pytest.raises(ValueError, match="too long"):
            map_shard(path)
        raw[8] = 2
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="version 2"):
            map_shard(path)

    def test_a_crash_before_the_rename_leaves_the_old_shard(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.tokens"
        write_shard(path, ["old"])
        before = path.read_bytes()

        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_shard(path, ["new"])
        assert path.read_bytes() == before

    def test_an_error_while_writing_leaves_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a.tokens", ByteTokenizer()):
            raise RuntimeError("disk")
        assert list(tmp_path.iterdir()) == []


class TestDocuments:
    def test_files_of_a_folder_are_sorted_and_hidden_ones_left_out(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", ".e.txt", "f.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        names = [p.relative_to(tmp_path).as_posix() for p in find_files([tmp_path], "*.txt")]
        assert names == ["a.txt", "b.txt", "sub/c.txt"]

    def test_missing_inputs_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            find_files([tmp_path / "nowhere"])
        with pytest.raises(FileNotFoundError, match=r"no file that matches '\*\.md'"):
            find_files([tmp_path], "*.md")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
    def test_a_pipe_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
            find_files([tmp_path / "pipe"])

    @pytest.mark.parametrize("damage", ["cut", "changed", "other"])
    @pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
    def test_a_damaged_gzip_file_is_named(self, tmp_path: Path, name: str, damage: str) -> None:
        generator = np.random.default_rng(0)
        text = "\n".join(json.dumps({"text": str(n)}) for n in generator.integers(0, 1 << 60, 5000))
        data = bytearray(gzip.compress(text.encode()))
        if damage == "changed" and "jsonl" in name:
            pytest.skip("a line that is no JSON comes first")
        if damage == "changed":
            data[len(data) // 2] ^= 0xFF
        (tmp_path / name).write_bytes({"cut": data[:-100], "changed": data, "other": b"no gzip"}[damage])
        with pytest.raises(ValueError, match=rf"{name} is not a whole gzip file"):
            for document in read_documents([tmp_path / name]):
                document.read()

    def test_half_a_surrogate_pair_is_no_character(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "bad \\ud83d end"}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl:2: 'text' has half a surrogate pair"):
            list(read_documents([path]))
        report = ReadReport()
        assert [d.read() for d in read_documents([path], on_bad_text="skip", report=report)] == ["fine 😀"]
        assert report.undecodable == 1
        texts = [d.read() for d in read_documents([path], on_bad_text="replace")]
        assert texts == ["fine 😀", "bad \ufffd end"]

    def test_texts_jsonl_and_gzip(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
        with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as f:
            f.write("zipped")
        lines = [json.dumps({"text": "x"}), "", json.dumps({"text": ""}), json.dumps({"text": "y", "n": 1})]
        (tmp_path / "c.jsonl").write_text("\n".join(lines))
        (tmp_path / "d.bin").write_bytes(b"\0\1")
        (tmp_path / "e.txt").write_text("")
        report = ReadReport()
        texts = [d.read() for d in read_documents(find_files([tmp_path]), report=report)]
        assert texts == ["one\r\ntwo", "zipped", "x", "y"]
        assert (report.binary_files, report.empty) == (1, 2)

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\ufeffone\ufefftwo", encoding="utf-8")
        (tmp_path / "b.jsonl").write_text('\ufeff{"text": "three"}\n{"text": "\ufefffour"}\n', encoding="utf-8")
        (tmp_path / "c.txt").write_text("\ufeff", encoding="utf-8")
        report = ReadReport()
        texts = [d.read() for d in read_documents(find_files([tmp_path]), report=report)]
        assert texts == ["one\ufefftwo", "three", "\ufefffour"]
        assert report.empty == 1

    def test_text_that_is_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.txt"
        path.write_bytes("café au lait".encode("latin-1"))
        with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: byte 0xe9"):
            list(read_documents([path]))
        report = ReadReport()
        assert list(read_documents([path], on_bad_text="skip", report=report)) == []
        assert report.undecodable == 1
        assert next(read_documents([path], on_bad_text="replace")).read() == "caf\ufffd au lait"
        with pytest.raises(ValueError, match="ignore"):
            list(read_documents([path], on_bad_text="ignore"))

    @pytest.mark.parametrize("line", ['{"content": "x"}', '{"text": 3}', "[1]", "{"])
    def test_a_bad_jsonl_line_is_named(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
        with pytest.raises(ValueError, match=r"a\.jsonl:2"):
            list(read_documents([tmp_path / "a.jsonl"]))

    def test_a_long_file_in_pieces_has_the_ids_of_the_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "".join(f"line {i} of  text\n{'    ' * (i % 3)}{'' if i % 5 else chr(10)}" for i in range(300))
        (tmp_path / "a.txt").write_text(text)
        monkeypatch.setattr(documents_module, "PIECE_CHARS", 200)
        document = next(read_documents([tmp_path / "a.txt"]))
        pieces = list(document.pieces())
        assert len(pieces) > 10
        assert "".join(pieces) == text
        tokenizer = small_bpe(400)
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)

    def test_a_long_line_is_cut_somewhere_in_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text("x" * 10_000)
        monkeypatch.setattr(documents_module, "PIECE_CHARS", 100)
        pieces = list(next(read_documents([tmp_path / "a.txt"])).pieces())
        assert "".join(pieces) == "x" * 10_000
        assert max(map(len, pieces)) <= 1600


class TestSplits:
    @pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
    def test_tail_is_nanogpts_split(self, fraction: float) -> None:
        text = "".join(chr(97 + i % 26) for i in range(1003))
        document = Document("d", lambda: iter([text[:100], text[100:950], text[950:]]))
        parts = {"train": "", "val": ""}
        ends = 0
        for split, piece, end in split_tail(document, fraction):
            parts[split] += piece
            ends += end
        cut = int(len(text) * (1 - fraction))
        assert (parts["train"], parts["val"]) == (text[:cut], text[cut:])
        assert ends == (1 if fraction == 0 else 2)

    def test_by_document_keeps_copies_together(self) -> None:
        texts = [f"document {i}" for i in range(400)]
        documents = [Document.from_text(str(i), t) for i, t in enumerate(texts + texts)]
        split = {"train": [], "val": []}
        for name, piece, _ in split_by_document(documents, 0.2):
            split[name].append(piece)
        assert not set(split["train"]) & set(split["val"])
        assert 100 < len(split["val"]) < 220


class TestPrepare:
    def test_a_dataset_holds_the_text(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        texts = [f"text number {i}\n" * 10 for i in range(5)]
        for i, text in enumerate(texts):
            (tmp_path / "in" / f"{i}.txt").write_text(text)
        done: list[int] = []
        files = find_files([tmp_path / "in"])
        manifest = prepare_files(files, tmp_path / "out", PrepareOptions(val=0.25), progress=done.append)
        tokenizer = dataset_tokenizer(tmp_path / "out")
        documents = {
            split: tokenizer.decode(i for i in all_ids(tmp_path / "out", split) if i != 256)
            for split in ("train", "val")
        }
        assert documents["train"] == "".join(t[: int(len(t) * 0.75)] for t in texts)
        assert documents["val"] == "".join(t[int(len(t) * 0.75) :] for t in texts)
        assert manifest["splits"]["train"]["documents"] == manifest["splits"]["val"]["documents"] == 5
        assert sum(done) == sum(len(t.encode()) for t in texts)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    def test_many_shards_are_one_text(self, tmp_path: Path) -> None:
        pieces = [("train", f"document {i} ", True) for i in range(50)]
        write_dataset(iter(pieces), tmp_path / "d", ByteTokenizer(), shard_tokens=100)
        data = TokenData.open(tmp_path / "d")
        assert len(data.arrays) > 3
        assert data.documents == 50
        assert ByteTokenizer().decode(np.concatenate(data.arrays).tolist()) == "".join(t for _, t, _ in pieces)

    def test_an_end_that_comes_alone_belongs_to_the_document_before_it(self, tmp_path: Path) -> None:
        pieces = [("train", "abcd", False), ("train", "", True), ("train", "efgh", False), ("train", "", True)]
        manifest = write_dataset(iter(pieces), tmp_path / "d", ByteTokenizer(), shard_tokens=4)
        shards = [a.tolist() for a in TokenData.open(tmp_path / "d").arrays]
        assert shards == [[*b"abcd", 256], [*b"efgh", 256]]
        assert manifest["splits"]["train"]["documents"] == 2

    def test_an_empty_document_leaves_no_trace(self, tmp_path: Path) -> None:
        pieces = [(split, text, True) for split, text in (("train", "abc"), ("train", ""), ("train", "d"), ("val", ""))]
        manifest = write_dataset(iter(pieces), tmp_path / "d", ByteTokenizer())
        assert all_ids(tmp_path / "d", "train").tolist() == [*b"abc", 256, *b"d", 256]
        assert list(manifest["splits"]) == ["train"] and manifest["splits"]["train"]["documents"] == 2
        names = ["dataset.json", "tokenizer", "train-00000.tokens"]
        assert sorted(p.name for p in (tmp_path / "d").iterdir()) == names, "nothing of the split without text"

    def test_characters_and_bpe_are_trained_and_validation_text_may_be_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "train.txt").write_text("abcabcabc " * 50)
        (tmp_path / "val.txt").write_text("xyz" * 50)
        for kind in ("chars", "bpe"):
            options = PrepareOptions(kind, vocab_size=260)
            prepare_files([tmp_path / "train.txt"], tmp_path / kind, options, val_files=[tmp_path / "val.txt"])
            tokenizer = load_tokenizer(tmp_path / kind / "tokenizer")
            assert tokenizer.decode(all_ids(tmp_path / kind, "val")[:-1].tolist()) == "xyz" * 50
        assert load_tokenizer(tmp_path / "bpe" / "tokenizer").encode("xyz") == [
            load_tokenizer(tmp_path / "bpe" / "tokenizer").encode(c)[0] for c in "xyz"
        ]  # no merge was learned from the validation text

    def test_nothing_is_overwritten_silently(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text " * 20)
        files = [tmp_path / "a.txt"]
        prepare_files(files, tmp_path / "d", PrepareOptions())
        with pytest.raises(FileExistsError, match="has a dataset already"):
            prepare_files(files, tmp_path / "d", PrepareOptions())
        prepare_files(files, tmp_path / "d", PrepareOptions("chars", overwrite=True))
        assert read_header(tmp_path / "d" / "train-00000.tokens").vocab_size < 20
        (tmp_path / "d" / "run").mkdir()
        with pytest.raises(FileExistsError, match=r"holds more than its dataset.*: run; move that"):
            prepare_files(files, tmp_path / "d", PrepareOptions(overwrite=True))
        (tmp_path / "d" / "run").rmdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "precious").write_text("x")
        with pytest.raises(FileExistsError, match="not a fastlm dataset"):
            prepare_files(files, tmp_path / "other", PrepareOptions(overwrite=True))
        with pytest.raises(FileExistsError, match="is a file"):
            prepare_files(files, tmp_path / "a.txt", PrepareOptions())

    def test_where_a_link_points_to(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text " * 20)
        (tmp_path / "far").mkdir()
        (tmp_path / "near").symlink_to(tmp_path / "far")
        for overwrite in (False, True):
            prepare_files([tmp_path / "a.txt"], tmp_path / "near", PrepareOptions(overwrite=overwrite))
            assert (tmp_path / "near").is_symlink() and (tmp_path / "far" / "dataset.json").is_file()

    def test_a_mount_point_cannot_be_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text("some text " * 20)
        (tmp_path / "mounted").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mounted")
        with pytest.raises(FileExistsError, match="is a mount point"):
            prepare_files([tmp_path / "a.txt"], tmp_path / "mounted", PrepareOptions())

    def test_a_failure_leaves_the_old_dataset_and_no_rubbish(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text " * 20)
        prepare_files([tmp_path / "a.txt"], tmp_path / "d", PrepareOptions())
        before = (tmp_path / "d" / "train-00000.tokens").read_bytes()
        (tmp_path / "b.txt").write_bytes(b"fine " * 1000 + b"\xff")
        with pytest.raises(ValueError, match="UTF-8"):
            prepare_files([tmp_path / "b.txt"], tmp_path / "d", PrepareOptions(overwrite=True))
        assert (tmp_path / "d" / "train-00000.tokens").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt", "d"]

    def test_a_killed_prepare_leaves_nothing_for_long(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text " * 2000)
        dying = (
            "import os, signal, sys; from pathlib import Path; from fastlm.data.pipeline import *\n"
            "die = lambda n: os.kill(os.getpid(), signal.SIGKILL)\n"
            "prepare_files([Path(sys.argv[1])], sys.argv[2], PrepareOptions(), progress=die)"
        )
        command = [sys.executable, "-c", dying, str(tmp_path / "a.txt"), str(tmp_path / "d")]
        assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".d.*.tmp"))) == 1
        prepare_files([tmp_path / "a.txt"], tmp_path / "d", PrepareOptions())
        assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "d"}

    def test_the_old_dataset_goes_when_the_new_one_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def prepare(text: str) -> None:
            write_dataset(iter([("train", text, True)]), tmp_path / "d", ByteTokenizer(), overwrite=True)

        def refuse(new: Path, old: Path) -> None:
            raise PermissionError("not now")

        prepare("old")
        with monkeypatch.context() as patch, pytest.raises(PermissionError, match="not now"):
            patch.setattr("fastlm.data.prepare.exchange", refuse)
            prepare("new")
        assert [p.name for p in tmp_path.iterdir()] == ["d"]
        assert bytes(all_ids(tmp_path / "d", "train")[:-1].tolist()) == b"old"

        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        aside = tmp_path / f".d.{dead.pid}.old"
        (tmp_path / "d").rename(aside)  # a process was killed between two renames
        with pytest.raises(FileExistsError, match="has a dataset already"):
            write_dataset(iter([("train", "new", True)]), tmp_path / "d", ByteTokenizer())
        shutil.copytree(tmp_path / "d", aside)  # another one while it removed the old dataset
        prepare("new")
        assert [p.name for p in tmp_path.iterdir()] == ["d"]
        assert bytes(all_ids(tmp_path / "d", "train")[:-1].tolist()) == b"new"

    def test_a_full_disk_leaves_the_old_dataset(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text " * 20_000)
        old = prepare_files([tmp_path / "a.txt"], tmp_path / "d", PrepareOptions())
        message = rf"dataset {tmp_path / 'd'} could not be written: .*File too large; the one before it is whole"
        with file_size_limit(100_000), pytest.raises(OSError, match=message):
            prepare_files([tmp_path / "a.txt"], tmp_path / "d", PrepareOptions(overwrite=True))
        assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "d"}
        assert TokenData.open(tmp_path / "d").tokens == old["splits"]["train"]["tokens"]

    @pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
    def test_without_any_text_it_says_what_was_left_out(self, tmp_path: Path, tokenizer: str) -> None:
        contents = {"empty": b"", "binary": b"a\0b", "utf16": "text".encode("utf-16"), "latin1": b"caf\xe9"}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        message = r"no text to tokenize; left out: 1 binary files, 1 files in UTF-16 \(make them UTF-8: iconv .*\), "
        message += "1 documents that are not UTF-8, 1 empty documents"
        with pytest.raises(ValueError, match=message):
            options = PrepareOptions(tokenizer, on_bad_text="skip")
            prepare_files([tmp_path / name for name in contents], tmp_path / "d", options)
        assert not (tmp_path / "d").exists()

    def test_bad_options(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(ValueError, match=r"val must be .* got 1.5"):
            prepare_files([tmp_path / "a.txt"], tmp_path / "d", PrepareOptions(val=1.5))
        assert not (tmp_path / "d").exists()

    def test_a_damaged_dataset_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text " * 20)
        folder = tmp_path / "d"
        prepare_files([tmp_path / "a.txt"], folder, PrepareOptions())
        with pytest.raises(ValueError, match="no split 'test', it has: train, val"):
            TokenData.open(folder, "test")
        with pytest.raises(FileNotFoundError, match="not a fastlm dataset"):
            TokenData.open(tmp_path)
        manifest = json.loads((folder / "dataset.json").read_text())
        manifest["tokenizer"] = "0" * 64
        (folder / "dataset.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="another tokenizer"):
            TokenData.open(folder)
        with pytest.raises(ValueError, match="not the one its shards were made with"):
            dataset_tokenizer(folder)
        (folder / "dataset.json").write_text("{")
        with pytest.raises(ValueError, match="damaged"):
            TokenData.open(folder)

    def test_tinyshakespeare_with_gpt2(self, data: Path, tmp_path: Path) -> None:
        options = PrepareOptions(str(data / "gpt2"))
        splits = prepare_files([data / "text" / "tinyshakespeare.txt"], tmp_path / "d", options)["splits"]
        tokens = {name: counts["tokens"] - counts["documents"] for name, counts in splits.items()}
        assert tokens == {"train": 301_966, "val": 36_059}


class TestStandardLibrary:
    def test_this_python_has_one(self) -> None:
        train, val = stdlib_documents(400_000)
        names = {d.name for d in train}, {d.name for d in val}
        assert len(names[0]) > 10
        assert not names[0] & names[1]
        assert 400_000 <= sum(len(d.read().encode()) for d in train + val) < 1_200_000

    def test_the_cap_moves_no_file_to_the_other_side(self, tmp_path: Path) -> None:
        for i in range(300):
            (tmp_path / f"m{i}.py").write_text(f"variable = {i}\n" * 10)
        small, large, whole = (stdlib_documents(n, root=tmp_path) for n in (15_000, 30_000, None))
        for side in (0, 1):
            few, more, every = ({d.name for d in part[side]} for part in (small, large, whole))
            assert few < more < every
        assert len(whole[0]) + len(whole[1]) == 300
        assert 5 <= len(whole[1]) <= 40

    def test_copies_tests_and_other_packages_are_left_out(self, tmp_path: Path) -> None:
        for name in ("a.py", "copy.py", "b.py", "site-packages/c.py", "test/d.py", "__pycache__/e.py", "pkg/f.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("same" if name in ("a.py", "copy.py") else name)
        (tmp_path / "table.py").write_text("codes = [1, 2, 3, 4, 5, 6]")
        (tmp_path / "bad.py").write_bytes(b"# caf\xe9")
        (tmp_path / "latin.py").write_bytes("# coding: latin-1\n# café".encode("latin-1"))
        train, val = stdlib_documents(root=tmp_path)
        assert sorted(d.name for d in train + val) == ["a.py", "b.py", "latin.py", "pkg/f.py"]

    def test_a_python_without_sources_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="--data"):
            stdlib_documents(root=tmp_path)
