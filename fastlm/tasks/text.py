"""Fine-tuning on a text: the objective of pretraining goes on, causal or masked as the model is."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data import TokenData, Tokenizer
from fastlm.data.loader import read_manifest
from fastlm.data.pipeline import PrepareOptions, prepare_files
from fastlm.models.encoder import Encoder
from fastlm.models.gpt import GPT
from fastlm.models.huggingface import model_from_pretrained
from fastlm.tasks.pretrained import check_adapters, open_pretrained, trained_model
from fastlm.training.config import RunConfig
from fastlm.training.distributed import Processes
from fastlm.training.journal import read_journal
from fastlm.training.run import LOG, Loaders, window_loaders


@dataclass
class TextSettings:
    """The [task] section of `--task text`."""

    train: str = ""  # a text file, or a dataset made by `fastlm prepare` with the model's tokenizer
    val: str = ""  # a text file; default: the last tenth of the text, or the dataset's own
    test: str = ""  # not used by this task: `fastlm evaluate` scores a text
    dropout: float = -1.0  # of the model while it learns; -1: its own


class Task:
    """See `fastlm.tasks.registry`."""

    Settings = TextSettings

    def __init__(self, model: Path, settings: TextSettings, config: RunConfig):
        if not settings.train:
            raise ValueError("task.train is missing: a text file, or a dataset made by `fastlm prepare`")
        if settings.test:
            raise ValueError("the task text has no test: score a text with `fastlm evaluate RUN --text FILE`")
        self._config, self._folder, self._settings = config, model, settings
        self.tokenizer: Tokenizer = open_pretrained(model)[1]
        train = Path(settings.train)
        if train.is_dir():
            self._train, self._val = self._open_dataset(train)
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="fastlm-text-")
            self._train, self._val = self._prepare(train, Path(self._temporary.name) / "data")

    def make_model(self) -> GPT | Encoder:
        """The pretrained model, with adapters where the config asks for them."""
        return trained_model(self._folder, self._config.lora, self._settings.dropout)

    def open_model(self, path: Path) -> GPT | Encoder:
        """Of a checkpoint; ValueError where its adapters are other ones."""
        model = model_from_pretrained(path)
        if not isinstance(model, (GPT, Encoder)):
            raise ValueError(f"{path} holds a {type(model).__name__}, wanted a GPT or an Encoder")
        check_adapters(model, self._config.lora, path)
        return model

    def loaders(self, model: GPT | Encoder, group: Processes) -> Loaders:
        """Windows of the text."""
        return window_loaders(self._train, self._val, model, self.tokenizer, self._config, group)

    def finish(self, run: Path) -> dict[str, Any]:
        """The validation loss before (at the first evaluation) and at its best."""
        losses = [record["val_loss"] for record in read_journal(run / LOG) if record["kind"] == "eval"]
        return {"first_val_loss": losses[0], "best_val_loss": min(losses)} if losses else {}

    def draw(self, run: Path, metrics: dict[str, Any]) -> None:
        """Nothing beside the losses."""

    def _open_dataset(self, folder: Path) -> tuple[TokenData, TokenData | None]:
        if self._settings.val:
            raise ValueError(f"{folder} is a dataset and has its own validation split: leave task.val out")
        train = TokenData.open(folder, "train")
        if train.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"the dataset {folder} was made with another tokenizer than the model's; "
                "give its text file as task.train"
            )
        return train, TokenData.open(folder, "val") if "val" in read_manifest(folder)["splits"] else None

    def _prepare(self, train: Path, out: Path) -> tuple[TokenData, TokenData | None]:
        if not train.is_file():
            raise FileNotFoundError(f"no such file: {train}")
        with tempfile.TemporaryDirectory(prefix="fastlm-tokenizer-") as tokenizer:
            self.tokenizer.save(tokenizer)
            val_files = [Path(self._settings.val)] if self._settings.val else []
            manifest = prepare_files([train], out, PrepareOptions(tokenizer=tokenizer), val_files=val_files)
        val = TokenData.open(out, "val") if "val" in manifest["splits"] else None
        return TokenData.open(out, "train"), val
