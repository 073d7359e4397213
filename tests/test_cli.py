"""The command line: every command once for real, and what bad input says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner, Result

import fastlm
from fastlm.cli import app
from fastlm.cli.errors import FriendlyGroup
from fastlm.cli.generate import TextStream
from fastlm.cli.loading import end_tokens, load_model
from fastlm.data import BPETokenizer, ByteTokenizer
from fastlm.training import choose_checkpoint, start_run
from tests.training_runs import SENTENCE, one_thread, quiet, tiny_config, write_tiny_dataset  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def fastlm_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeeds(*arguments: object) -> str:
    result = fastlm_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object, code: int = 1) -> str:
    """The message of a command that fails as it should: an exit code, one message, no traceback."""
    result = fastlm_command(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def trained(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a dataset `data`, a run `run`, and a text `held_out.txt`."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(
        write_tiny_dataset(folder / "data"),
        model={"dropout": 0.0},
        training={"steps": 80, "lr": 2e-2, "grad_accum": 1, "batch_size": 8},
        checkpoint={"every": 0},
    )
    start_run(config, folder / "run", display=quiet())
    (folder / "held_out.txt").write_text(SENTENCE * 3)
    return folder


class TestPrepareAndTrain:
    def test_from_text_to_a_resumed_run(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(SENTENCE * 100)
        out = succeeds("prepare", tmp_path / "a.txt", "--out", tmp_path / "data", "--tokenizer", "chars")
        assert "train" in out and "val" in out and "4,050 bytes" in out
        (tmp_path / "c.toml").write_text(
            "[model]\nn_layer = 1\nn_head = 2\nn_embd = 8\nblock_size = 8\n[training]\nsteps = 9\n"
        )
        sets = ["--set", "training.steps=2", "--set", "training.batch_size=2", "--set", "training.device=cpu"]
        run = tmp_path / "run"
        arguments = ["train", "--config", tmp_path / "c.toml", "--data", tmp_path / "data", "--out", run, *sets]
        out = succeeds(*arguments)
        assert "done at step 2" in out and "validation loss" in out
        assert "has a run already" in fails(*arguments)
        assert "done at step 3" in succeeds("train", "--resume", run, "--set", "training.steps=3")
        assert choose_checkpoint(run, "last").step == 3

    def test_wrong_settings_and_arguments(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        assert "did you mean 'lr'?" in fails("train", "--out", run, "--set", "training.lrr=1")
        assert "data.path is missing" in fails("train", "--out", run)
        assert "not a fastlm dataset" in fails("train", "--out", run, "--data", tmp_path)
        assert "either --out" in fails("train", code=2)
        assert "no such config file" in fails("train", "--out", run, "--config", tmp_path / "x.toml")
        assert "is not a run" in fails("train", "--resume", tmp_path)
        assert not run.exists()

    def test_wrong_texts(self, tmp_path: Path) -> None:
        out = ("--out", tmp_path / "data")
        assert "no such file or folder" in fails("prepare", tmp_path / "nothing", *out)
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
        assert "is not UTF-8 text" in fails("prepare", tmp_path / "latin.txt", *out)
        (tmp_path / "empty.txt").write_text("")
        assert "no text" in fails("prepare", tmp_path / "empty.txt", *out)
        (tmp_path / "a.txt").write_text(SENTENCE)
        assert "no such file or folder" in fails("prepare", tmp_path / "a.txt", *out, "--tokenizer", "bytez")
        assert "Invalid value for '--threads'" in fails("prepare", tmp_path / "a.txt", *out, "--threads", -1, code=2)
        assert not (tmp_path / "data").exists()

    def test_a_text_with_too_few_merges_is_noted(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(SENTENCE * 9)
        arguments = ("prepare", tmp_path / "a.txt", "--tokenizer", "bpe", "--overwrite", "--out", tmp_path / "data")
        assert "note: fewer ids than --vocab-size 8192" in succeeds(*arguments)
        assert "note" not in succeeds(*arguments, "--vocab-size", 260)


class TestEvaluate:
    def test_a_text(self, trained: Path) -> None:
        score = json.loads(succeeds("evaluate", trained / "run", "--text", trained / "held_out.txt", "--json"))
        assert score["tokens"] == score["text_bytes"] == len(SENTENCE * 3)
        assert 0 < score["bits_per_byte"] < 3
        assert score["gzip_bits_per_byte"] > 1
        (trained / "marked.txt").write_text("\ufeff" + SENTENCE * 3, encoding="utf-8")  # a byte order mark
        marked = succeeds("evaluate", trained / "run", "--text", trained / "marked.txt", "--json")
        assert json.loads(marked) == score
        shown = succeeds("evaluate", trained / "run", "--text", trained / "held_out.txt", "--stride", 4)
        assert "bits_per_byte" in shown and "perplexity" in shown

    def test_a_dataset_and_questions(self, trained: Path, tmp_path: Path) -> None:
        score = json.loads(succeeds("evaluate", trained / "run", "--data", trained / "data", "--json"))
        assert score["tokens"] == len(SENTENCE) * 10 + 1
        rows = [{"ctx": "the quick", "endings": ["brown fox", "xqz zzq"], "label": 0}] * 3
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        score = json.loads(
            succeeds("evaluate", trained / "run", "--choices", tmp_path / "q.jsonl", "--limit", 2, "--json")
        )
        assert (score["questions"], score["acc"]) == (2, 1.0)

    def test_bad_input(self, trained: Path, tmp_path: Path) -> None:
        run = trained / "run"
        assert "give one of" in fails("evaluate", run, code=2)
        assert "no such file" in fails("evaluate", run, "--text", tmp_path / "no.txt")
        assert "no such folder" in fails("evaluate", tmp_path / "no", "--text", trained / "held_out.txt")
        assert "is no run" in fails("evaluate", tmp_path, "--text", trained / "held_out.txt")
        (tmp_path / "t.txt").write_bytes(b"\xff")
        assert "not UTF-8" in fails("evaluate", run, "--text", tmp_path / "t.txt")
        (tmp_path / "t.txt").write_text("")
        assert "the text is empty" in fails("evaluate", run, "--text", tmp_path / "t.txt")
        (tmp_path / "t.txt").write_text("ÄÖÜ")
        assert "'Ä'" in fails("evaluate", run, "--text", tmp_path / "t.txt")
        text = trained / "held_out.txt"
        assert "Invalid value for '--batch-size'" in fails("evaluate", run, "--text", text, "--batch-size", 0, code=2)
        assert "Invalid value for '--limit'" in fails("evaluate", run, "--choices", text, "--limit", 0, code=2)
        assert "wanted the best or the last" in fails(
            "evaluate", run, "--text", trained / "held_out.txt", "--checkpoint", "first"
        )
        ByteTokenizer().save(tmp_path / "bytes")
        assert "do not belong together" in fails(
            "evaluate", run, "--text", trained / "held_out.txt", "--tokenizer", tmp_path / "bytes"
        )


class TestGenerate:
    def test_it_knows_the_sentence_and_a_seed_repeats(self, trained: Path) -> None:
        arguments = ("generate", trained / "run", "--prompt", "the quick br", "--max-new-tokens", 30)
        assert succeeds(*arguments, "--temperature", 0).startswith("the quick brown fox")
        sampled = [succeeds(*arguments, "--temperature", 2, "--seed", s) for s in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]

    def test_prompts_in_a_batch_give_what_each_gives_alone(self, trained: Path) -> None:
        prompts = ("the quick br", "lazy ", "jumps o")
        options = ("--max-new-tokens", 12, "--temperature", 0)
        alone = [succeeds("generate", trained / "run", "--prompt", p, *options).rstrip("\n") for p in prompts]
        together = succeeds("generate", trained / "run", *[x for p in prompts for x in ("--prompt", p)], *options)
        assert together == "".join(f"--- {p!r}\n{text}\n" for p, text in zip(prompts, alone, strict=True))

    def test_a_stop_string_ends_the_text_before_it(self, trained: Path) -> None:
        arguments = ("generate", trained / "run", "--prompt", "the quick br", "--temperature", 0)
        assert succeeds(*arguments, "--stop", "n f", "--max-new-tokens", 30) == "the quick brow\n"

    def test_bad_input(self, trained: Path, tmp_path: Path) -> None:
        run = trained / "run"
        assert "the model's context is 16: give only the end of it" in fails("generate", run, "--prompt", SENTENCE)
        assert "'É'" in fails("generate", run, "--prompt", "É")
        for options in (("--temperature", -1), ("--min-p", 2), ("--top-k", 0), ("--repetition-penalty", 0)):
            name = options[0].removeprefix("--").replace("-", "_")
            assert fails("generate", run, "--prompt", "the", *options).startswith(f"error: {name}")  # no prompt shown
        assert "Invalid value for '--seed'" in fails("generate", run, "--seed", 2**70, code=2)
        missing = fails("generate", tmp_path / "no")
        assert "no such folder" in missing and "`hf download NAME --local-dir FOLDER`" in missing

    def test_a_run_is_no_model_folder_and_has_one(self, trained: Path) -> None:
        model = choose_checkpoint(trained / "run", "best").model_path
        for folder in (trained / "run", model.parent):
            with pytest.raises(
                FileNotFoundError, match=rf"has no config.json; .*give the folder of a model, here {model}"
            ):
                fastlm.GPT.from_pretrained(folder)

    def test_the_dtype_of_the_weights(self, trained: Path, tmp_path: Path) -> None:
        run = trained / "run"
        for name, dtype in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            assert load_model(run, dtype=name)[0].wte.weight.dtype == dtype
        assert succeeds("generate", run, "--prompt", "the", "--dtype", "bfloat16", "--max-new-tokens", 2)
        assert "--dtype must be one of auto," in fails("generate", run, "--prompt", "the", "--dtype", "int8")
        size = ByteTokenizer().vocab_size
        fastlm.LSTMLM(size, 8, 8, 1).save_pretrained(tmp_path / "lstm")
        ByteTokenizer().save(tmp_path / "lstm")
        assert "an LSTM's weights are float32" in fails("generate", tmp_path / "lstm", "--dtype", "bfloat16")
        assert load_model(tmp_path / "lstm")[0].config.vocab_size == size

    def test_a_model_folder_says_how_texts_begin_and_end(self, tmp_path: Path) -> None:
        tokenizer = BPETokenizer.train([SENTENCE] * 9, 300)
        tokenizer.backend.add_special_tokens(["<s>", "<turn>"])
        begin, turn = (tokenizer.backend.token_to_id(name) for name in ("<s>", "<turn>"))
        tokenizer.backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
        size = tokenizer.backend.get_vocab_size()
        config = fastlm.GPTConfig(vocab_size=size, block_size=16, n_layer=1, n_head=1, n_embd=8)
        fastlm.GPT(config).save_pretrained(tmp_path / "model", extra_config={"eos_token_id": turn})
        tokenizer.save(tmp_path / "model")
        _, loaded = load_model(tmp_path / "model")
        assert loaded.begin == [begin]
        assert end_tokens(tmp_path / "model", loaded) == [loaded.eot, turn]
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [begin, turn]}))
        assert end_tokens(tmp_path / "model", loaded) == [loaded.eot, begin, turn]
        assert succeeds("generate", tmp_path / "model", "--prompt", "the", "--max-new-tokens", 3).startswith("the")
        (tmp_path / "text.txt").write_text(SENTENCE)
        assert succeeds("evaluate", tmp_path / "model", "--text", tmp_path / "text.txt", "--json")

    def test_a_stream_holds_back_what_may_be_a_stop_string(self) -> None:
        stream = TextStream(ByteTokenizer().stream(), ["END", "Ex"])
        shown = [stream.push(b) for b in b"aEbENcEN"]
        assert shown == ["a", "", "Eb", "", "", "ENc", "", ""]
        assert [stream.push(b) for b in b"Dxyz"] == [""] * 4
        assert stream.flush() == ""
        assert stream.text == "aEbENc"
        unfinished = TextStream(ByteTokenizer().stream(), ["END"])
        assert unfinished.push(ord("E")) + unfinished.flush() == "E"


class TestDemo:
    def test_it_leaves_a_whole_run(self, tmp_path: Path) -> None:
        """In a process of its own, as a user starts it, with its output into a pipe."""
        text = tmp_path / "text.txt"
        text.write_text("".join(f"{i} is followed by {i + 1}; " for i in range(1200)))
        run = tmp_path / "run"
        command = [
            sys.executable,
            "-m",
            "fastlm",
            "demo",
            "--steps",
            "2",
            "--data",
            text,
            "--out",
            run,
            "--device",
            "cpu",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        for words in ("gzip -9", "this model", "sample", "2 steps of 2,048 tokens", "step 2/2", str(run)):
            assert words in done.stdout
        assert "\x1b" not in done.stdout  # no colours or moving bars in a pipe
        assert {"config.toml", "tokenizer", "log.jsonl", "loss.png", "checkpoints", "data"} == {
            p.name for p in run.iterdir()
        }
        assert choose_checkpoint(run, "last").step == 2
        assert "has a run already" in fails("demo", "--data", text, "--out", run)
        assert len(succeeds("generate", run, "--prompt", "12 is ", "--max-new-tokens", 3)) > len("12 is \n")

    def test_bad_texts(self, tmp_path: Path) -> None:
        out = ("--out", tmp_path / "run")
        assert "no such file or folder" in fails("demo", "--data", tmp_path / "no", *out)
        (tmp_path / "empty.txt").write_text("")
        assert "there is no text" in fails("demo", "--data", tmp_path / "empty.txt", *out)
        (tmp_path / "short.txt").write_text("hello world")
        assert "the text is too short: 9 bytes" in fails("demo", "--data", tmp_path / "short.txt", *out)
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
        assert "is not UTF-8 text" in fails("demo", "--data", tmp_path / "latin.txt", *out)
        (tmp_path / "file").write_text("x")
        assert "is a file" in fails("demo", "--out", tmp_path / "file")
        assert "device" in fails("demo", "--device", "tpu", *out)
        assert not (tmp_path / "run").exists()


def test_info_tells_what_runs_where() -> None:
    out = succeeds("info")
    for words in ("fastlm", fastlm.__version__, "torch", "layer_norm", "attention", "reference"):
        assert words in out


def test_help_names_every_command() -> None:
    out = succeeds("--help")
    for command in ("demo", "prepare", "train", "evaluate", "generate", "info"):
        assert command in out
    assert "Usage" in fastlm_command().output


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTLM_TRACEBACK", "1")
    result = fastlm_command("demo", "--data", tmp_path / "no")
    assert isinstance(result.exception, FileNotFoundError)


def test_a_wrong_backend_of_the_environment_is_one_line() -> None:
    """In a process of its own: the variable is read when fastlm is imported."""
    command = [sys.executable, "-m", "fastlm", "info"]
    environment = {**os.environ, "FASTLM_BACKEND": "foo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: FASTLM_BACKEND='foo': there is no such backend")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["--help", "info", "generate"])
def test_a_reader_that_has_gone_is_no_error(command: str, trained: Path) -> None:
    """`fastlm … | head`: help is printed by typer's console, info by ours, a generated text by none."""
    arguments = [command, *([trained / "run", "--prompt", "the"] if command == "generate" else [])]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fastlm", *arguments], stdout=write, stderr=subprocess.PIPE, timeout=300
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_pipe_that_breaks_elsewhere_is_an_error() -> None:
    """Not the reader of the output has gone (which is none), but a tracker's process, say."""
    app = typer.Typer(cls=FriendlyGroup)

    @app.command()
    def command() -> None:
        raise BrokenPipeError(32, "the tracker has gone")

    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["command"])
    assert result.exit_code == 1 and "the tracker has gone" in result.stderr
