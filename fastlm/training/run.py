"""A run and its folder: start one, or go on with one.

run/
  config.toml          every setting, defaults included
  tokenizer/
  log.jsonl            one line a step, an evaluation, a sample, a checkpoint
  checkpoints/         fastlm/training/checkpoint.py
  loss.png
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

import fastlm
from fastlm.data import MaskedLoader, TokenData, Tokenizer, WindowLoader, dataset_tokenizer, load_tokenizer
from fastlm.data.batches import Loader
from fastlm.data.loader import read_manifest
from fastlm.data.masking import Masker
from fastlm.data.special import special_ids
from fastlm.data.streams import StreamLoader
from fastlm.files import replace_text
from fastlm.models.encoder import Encoder, EncoderConfig
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.huggingface import model_from_pretrained
from fastlm.models.lstm import LSTMLM, LSTMConfig
from fastlm.training.allocator import keep_freed_memory
from fastlm.training.announce import announce, device_name
from fastlm.training.checkpoint import Checkpoint, find_checkpoint
from fastlm.training.config import LoraConfig, RunConfig, config_to_toml, load_config
from fastlm.training.distributed import Processes, processes
from fastlm.training.journal import Journal
from fastlm.training.plot import picture_or_note, plot_losses
from fastlm.training.progress import Display, PlainDisplay, make_display
from fastlm.training.trackers import check_installed, make_trackers
from fastlm.training.trainer import Trainer, TrainResult, is_out_of_patience, resolve_device

CONFIG, LOG, PICTURE = "config.toml", "log.jsonl", "loss.png"


Loaders = tuple[Loader, "Loader | None"]


class Source(Protocol):
    """What a run begins with: `Pretraining`, or a task of `fastlm.tasks`."""

    tokenizer: Tokenizer

    def make_model(self) -> Any:
        """The model, on the CPU (see `Trainer` for what it has to have)."""
        ...

    def open_model(self, path: Path) -> Any:
        """The model in a checkpoint of the run; ValueError where it is another one than `make_model` makes."""
        ...

    def loaders(self, model: Any, group: Processes) -> Loaders:
        """Where this process takes its batches from: for training and, if there is any, for validation. Sets
        training.steps in the config where they follow from the data."""
        ...


class RunDoneError(ValueError):
    """There is nothing left to train in a run. `reason`: why it ended, as in `TrainResult`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def start_run(
    config: RunConfig, run: str | Path, *, display: Display | None = None, source: Source | None = None
) -> TrainResult:
    """Train into a new run folder. Under torchrun all processes call it, and the first one writes.

    Args:
        source: default: the model and the dataset that the config names, from scratch.

    Raises:
        FileExistsError: the folder is not empty: a run is never overwritten.
        ValueError, FileNotFoundError: a setting or the data is wrong; nothing has been written then.
    """
    run = Path(run)
    check_free(run)
    check_installed(config.logging)
    with processes(config.training.device) as (group, device):
        torch_device = resolve_device(device)
        source = source or Pretraining(config)
        torch.manual_seed(config.training.seed)  # the same weights on every process
        model = source.make_model()
        _check_samples(config, model, source.tokenizer)
        loaders = source.loaders(model, group)
        _check_patience(config, loaders)
        model.to(torch_device)
        torch.manual_seed(config.training.seed + group.rank)  # and another dropout on each
        group.barrier()  # every process has seen that the folder is free
        if group.is_first:
            run.mkdir(parents=True, exist_ok=True)
            source.tokenizer.save(run / "tokenizer")
            replace_text(run / CONFIG, config_to_toml(config))
        trainer = _trainer(model, config, source.tokenizer, loaders, run, group, display)
        trainer.journal.write("start", step=0, **_about(trainer))
        return _fit(trainer, run)


def resume_run(run: str | Path, *, overrides: tuple[str, ...] = (), display: Display | None = None) -> TrainResult:
    """Go on with a run of pretraining from its newest checkpoint, as if it had never stopped.

    Args:
        overrides: settings to change, as "training.steps=2000". A run resumed with none of them is bit for bit the run
            that was never stopped, on the same machine, with the same numbers of processes and threads.

    Raises:
        FileNotFoundError, ValueError: no run, no whole checkpoint, or other data than the run was started with.
    """
    config = run_config(run, overrides)
    if config.task:
        raise ValueError(f"{run} is a fine-tuning run: go on with it by `fastlm finetune --resume {run}`")
    check_still_there(run, {"data.path": config.data.path})
    return continue_run(config, run, display=display)


def check_still_there(run: str | Path, paths: dict[str, str]) -> None:
    """FileNotFoundError where something that a run goes on with, named by its setting, is not where it was."""
    for setting, path in paths.items():
        if path and not os.path.exists(path):
            raise FileNotFoundError(
                f"{run} goes on with {setting}, and there is nothing at {path}: where it has been moved, say so by "
                f"--set {setting}=PATH" + (" or --data PATH" if setting == "data.path" else "")
            )


def run_config(run: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The settings of a run, and changes to them."""
    if not (Path(run) / CONFIG).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {CONFIG}")
    return load_config(Path(run) / CONFIG, overrides)


def continue_run(
    config: RunConfig, run: str | Path, *, display: Display | None = None, source: Source | None = None
) -> TrainResult:
    """`resume_run` with settings that have been read, and any source.

    Raises:
        RunDoneError: the run has done all its steps, or ended early.
    """
    run = Path(run)
    check_installed(config.logging)
    checkpoint = _newest_checkpoint(run)
    with processes(config.training.device) as (group, device):
        source = source or Pretraining(config)
        if source.tokenizer.fingerprint != load_tokenizer(run / "tokenizer").fingerprint:
            raise ValueError(f"the tokenizer in {run} is another one than that of the data and the model")
        model = source.open_model(checkpoint.model_path).to(resolve_device(device))
        _check_samples(config, model, source.tokenizer)
        loaders = source.loaders(model, group)
        _check_patience(config, loaders)
        state = checkpoint.load_state()
        _check_not_done(run, state, config)
        group.barrier()  # every process has found the checkpoint before the first one goes on
        trainer = _trainer(
            model, config, source.tokenizer, loaders, run, group, display, keep_until_step=checkpoint.step
        )
        trainer.load_state_dict(state)
        del state  # it is as large as the optimizer's
        if group.is_first:
            replace_text(run / CONFIG, config_to_toml(config))
        trainer.journal.write("resume", step=checkpoint.step, **_about(trainer))
        return _fit(trainer, run)


def choose_checkpoint(run: str | Path, which: str = "best") -> Checkpoint:
    """The "best" (by validation loss, else the newest) or the "last" checkpoint of a run folder."""
    if which not in ("best", "last"):
        raise ValueError(f"wanted the best or the last checkpoint, got {which!r}")
    checkpoint = find_checkpoint(Path(run) / "checkpoints", which)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint")
    return checkpoint


def check_free(run: Path) -> None:
    """Raise FileExistsError where something lies in the run folder already, other than a dataset in `data/`."""
    if run.is_file():
        raise FileExistsError(f"{run} is a file, wanted a folder for the run")
    if (run / CONFIG).exists():
        raise FileExistsError(f"{run} has a run already: choose another folder, or go on with it (--resume {run})")
    if run.is_dir() and any(p.name != "data" for p in run.iterdir()):
        raise FileExistsError(f"the folder {run} is not empty: choose another one for the run")


def make_model_config(config: RunConfig, tokenizer: Tokenizer) -> GPTConfig | EncoderConfig | LSTMConfig:
    """The model's configuration: preset, then the fields given, then the tokenizer's vocabulary.

    A masked model has one id more than the tokenizer, for the mask, unless the vocabulary has such a token.
    """
    fields: dict[str, Any] = dict(config.model)
    masked = config.training.objective == "masked"
    needed = tokenizer.vocab_size
    if masked:
        mask = special_ids(tokenizer).mask
        needed += mask is None
        fields.setdefault("mask_token_id", tokenizer.vocab_size if mask is None else mask)
    vocab_size = fields.setdefault("vocab_size", needed)
    if vocab_size < needed:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's vocabulary of {tokenizer.vocab_size}"
            + (" and the mask" if masked and needed > tokenizer.vocab_size else "")
        )
    preset = fields.pop("preset", None)
    if config.training.objective == "recurrent":
        return LSTMConfig.from_dict(fields)
    kind: Any = EncoderConfig if masked else GPTConfig
    return kind.preset(preset, **fields) if preset else kind.from_dict(fields)


class Pretraining:
    """A `Source`: the dataset of a run, its tokenizer, and a new model over its vocabulary."""

    def __init__(self, config: RunConfig):
        self._config = config
        folder = config.data.path
        if not folder:
            raise ValueError("data.path is missing: the folder of a dataset made by `fastlm prepare`")
        folder = config.data.path = os.path.abspath(folder)  # the run goes on from any directory
        for section, given in (("task", bool(config.task)), ("lora", config.lora != LoraConfig())):
            if given:
                raise ValueError(f"[{section}] has no meaning in pretraining: `fastlm finetune` has tasks and adapters")
        splits = read_manifest(folder)["splits"]
        self.train = TokenData.open(folder, "train")
        self.val = TokenData.open(folder, "val") if "val" in splits else None
        self.tokenizer = dataset_tokenizer(folder)

    def make_model(self) -> GPT | Encoder | LSTMLM:
        """From scratch; notes in the config what the presets and the tokenizer came to."""
        model_config = make_model_config(self._config, self.tokenizer)
        self._config.model = model_config.to_dict()
        if isinstance(model_config, LSTMConfig):
            return LSTMLM.from_config(model_config)
        return GPT(model_config) if isinstance(model_config, GPTConfig) else Encoder(model_config)

    def open_model(self, path: Path) -> GPT | Encoder | LSTMLM:
        """Of a checkpoint; ValueError where the config is of another one."""
        model = model_from_pretrained(path)
        if model.config != make_model_config(self._config, self.tokenizer):
            raise ValueError(f"the checkpoint {path} is of another model than the one in the run's {CONFIG}")
        return model

    def loaders(self, model: GPT | Encoder | LSTMLM, group: Processes) -> Loaders:
        """Of the training split and, where there is one, the validation split; ValueError where a text is too short."""
        if isinstance(model, LSTMLM):
            return _stream_loaders(self.train, self.val, model, self._config, group)
        return window_loaders(self.train, self.val, model, self.tokenizer, self._config, group)


def window_loaders(
    train: TokenData,
    val: TokenData | None,
    model: GPT | Encoder,
    tokenizer: Tokenizer,
    config: RunConfig,
    group: Processes,
) -> Loaders:
    """Windows of a text, with tokens left out where the model is a masked one."""
    settings, block_size = config.training, model.config.block_size
    windows = WindowLoader(
        train, settings.batch_size, block_size, seed=settings.seed, order=config.data.order,
        rank=group.rank, world_size=group.world_size,
    )  # fmt: skip
    val_windows = None
    if val is not None:
        try:
            val_windows = WindowLoader(val, settings.batch_size, block_size)
        except ValueError as e:
            raise ValueError(f"validation split of {config.data.path or val.paths[0].parent}: {e}") from None
    if isinstance(model, GPT):
        return windows, val_windows
    masker = Masker.make(tokenizer, config.masking, model.config.mask_token_id)
    return MaskedLoader(windows, masker), None if val_windows is None else MaskedLoader(val_windows, masker)


def _stream_loaders(
    train: TokenData, val: TokenData | None, model: LSTMLM, config: RunConfig, group: Processes
) -> Loaders:
    """Rows that read the text from window to window."""
    settings, block_size = config.training, model.config.block_size
    streams = StreamLoader(
        train, settings.batch_size, block_size, accumulation=settings.grad_accum,
        rank=group.rank, world_size=group.world_size,
    )  # fmt: skip
    if val is None:
        return streams, None
    try:
        return streams, StreamLoader(val, min(settings.batch_size, max(1, val.tokens // (block_size + 1))), block_size)
    except ValueError as e:
        raise ValueError(f"validation split of {config.data.path}: {e}") from None


def _check_samples(config: RunConfig, model: Any, tokenizer: Tokenizer) -> None:
    every = config.evaluation.sample_every
    if every and not hasattr(model, "generate"):
        raise ValueError(
            f"this model ({type(model).__name__}) does not continue texts: evaluation.sample_every is {every}, not 0"
        )
    if every:
        try:
            tokenizer.encode(config.evaluation.prompt)
        except ValueError as error:
            raise ValueError(f"evaluation.prompt: {error}") from None


def _check_patience(config: RunConfig, loaders: Loaders) -> None:
    if config.evaluation.patience and loaders[1] is None:
        raise ValueError(
            f"evaluation.patience={config.evaluation.patience} needs a validation split, and the data have none"
        )


def _newest_checkpoint(run: Path) -> Checkpoint:
    checkpoint = find_checkpoint(run / "checkpoints", "last")
    if checkpoint is None:
        raise FileNotFoundError(
            f"{run} has no checkpoint to resume from: it stopped before the first was written; remove the folder and "
            "start it anew"
        )
    return checkpoint


def _check_not_done(run: Path, state: dict[str, Any], config: RunConfig) -> None:
    step, without_better = state["step"], state["evaluations_since_best"]
    if step >= config.training.steps:
        raise RunDoneError(
            f"{run} is done: its checkpoint is of step {step} of {config.training.steps}; "
            "to train longer, set training.steps (or task.epochs) higher",
            "done",
        )
    if is_out_of_patience(without_better, config):
        raise RunDoneError(
            f"{run} is done: it ended early at step {step}, after {without_better} evaluations without a better one; "
            f"to train longer, set evaluation.patience higher than {without_better}, or to 0 (no early stop)",
            "early stop",
        )


def _trainer(
    model: Any,
    config: RunConfig,
    tokenizer: Tokenizer,
    loaders: Loaders,
    run: Path,
    group: Processes,
    display: Display | None,
    keep_until_step: int | None = None,
) -> Trainer:
    """The trainer of this process; only the first one has a log, a display and trackers."""
    if config.training.keep_memory and model.device.type == "cpu":
        keep_freed_memory()
    if group.is_first:
        journal = Journal(run / LOG, keep_until_step=keep_until_step)
        trackers = make_trackers(config.logging, run, dataclasses.asdict(config))
    else:
        journal, trackers, display = Journal(os.devnull), [], PlainDisplay(Console(quiet=True))
    return Trainer(
        model, tokenizer, config, *loaders,
        run=run, journal=journal, display=display or make_display(), trackers=trackers, group=group,
    )  # fmt: skip


def _about(trainer: Trainer) -> dict[str, Any]:
    """What the first line of a log tells of the run and its machine."""
    return {
        "fastlm": fastlm.__version__,
        "torch": torch.__version__,
        "device": device_name(trainer.device),
        "processes": trainer.group.world_size,
        "precision": trainer.precision,
        "parameters": trainer.model.num_parameters(),
        "flops_per_token": trainer.flops_per_token,
        "peak_flops": trainer.peak_flops or "unknown",
        "bytes_per_token": trainer.train_loader.bytes_per_token,
    }


def _fit(trainer: Trainer, run: Path) -> TrainResult:
    try:
        announce(trainer)
        return trainer.fit()
    finally:
        trainer.journal.close()
        for tracker in trainer.trackers:
            tracker.close()
        size = (trainer.val_loader or trainer.train_loader).bytes_per_token
        if trainer.group.is_first:
            with picture_or_note(run / PICTURE, trainer.display.note):
                plot_losses(run / LOG, run / PICTURE, title=run.name, bytes_per_token=size)
