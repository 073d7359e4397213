"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlm.data import Tokenizer
from fastlm.data.batches import Batch, Loader, forward_arguments
from fastlm.models.gpt import GPT
from fastlm.models.lstm import LSTMLM
from fastlm.nn.modes import autocast, evaluating
from fastlm.optim import clip_grad_norm
from fastlm.training.checkpoint import CheckpointWriter, rng_state, set_rng_state
from fastlm.training.config import RunConfig
from fastlm.training.distributed import Processes
from fastlm.training.flops import peak_flops
from fastlm.training.graph import RecordedPass
from fastlm.training.journal import Journal
from fastlm.training.optimizer import make_optimizer
from fastlm.training.progress import Display
from fastlm.training.recurrent import HiddenStates
from fastlm.training.schedule import learning_rate
from fastlm.training.sharding import Shards
from fastlm.training.signals import StopRequest
from fastlm.training.trackers import Tracker


class NonFiniteLossError(ValueError):
    """The loss or a gradient became NaN or infinite; the weights are those before that step."""


@dataclass
class TrainResult:
    """How a run ended: `reason` is "done", "early stop", "out of time", or the name of a signal."""

    reason: str
    step: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_second: float


class Trainer:
    """Trains a model on batches; everything that must survive a crash is in its `state_dict` and in the checkpoint.

    Args:
        model: on its device already: GPT, Encoder, or another module whose forward(x, y, …) returns (_, loss) and that
            has `device`, `gradient_checkpointing`, `flops_per_token(length)` and `save_pretrained(path, format=)`.
        train, val: where batches come from; without `val` there is no validation.
        run: the run folder.
        journal, display, trackers: where numbers go.
        group: the processes that train together; the model is the same on all of them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: RunConfig,
        train: Loader,
        val: Loader | None,
        *,
        run: Path,
        journal: Journal,
        display: Display,
        trackers: list[Tracker] | None = None,
        group: Processes | None = None,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.train_loader, self.val_loader = train, val
        self.journal, self.display, self.trackers = journal, display, trackers or []
        self.group = group or Processes()
        self.device = model.device
        self.precision = resolve_precision(config.training.precision, self.device)
        model.gradient_checkpointing = config.training.gradient_checkpointing
        self.flops_per_token = model.flops_per_token(train.block_size)
        self.writer = CheckpointWriter(
            run / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            clean=self.group.is_first,
        )
        self.shards: Shards | None = None  # of the model, where each process keeps a part of it
        if config.training.parallel == "fsdp" and self.group.world_size > 1:
            if self.group.is_first:
                self.writer.prepare(model)
            self.shards = Shards(model)
        self.averaging: Any = self.group.wrap(model) if self.shards is None else model
        self.forward: Any = torch.compile(self.averaging) if config.training.compile else self.averaging
        self.optimizer = make_optimizer(self.shards or model, config.optimizer, config.training.lr)
        self.peak_flops = peak_flops(self.device, self.precision)
        self.hidden = HiddenStates() if isinstance(model, LSTMLM) else None  # of a recurrent model's streams
        self.recorded = RecordedPass(self._pass, model.parameters()) if self._can_record() else None
        self.step = 0  # optimizer steps done
        self.train_loss: float | None = None
        self.val_loss: float | None = None  # None until evaluated, and again after a step
        self.best_val_loss: float | None = None
        self.evaluations_since_best = 0
        self._saved_at: int | None = None

    def fit(self) -> TrainResult:
        """Train until the last step, an early stop, the end of the time, or a signal, and save a checkpoint of the end.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            CheckpointError: a checkpoint could not be written.
        """
        steps = self.config.training.steps
        reason = "early stop" if self.is_out_of_patience else "done"
        trained_tokens, trained_seconds = 0, 0.0
        deadline = time.monotonic() + (60 * self.config.training.max_minutes or math.inf)
        self.model.train()
        self.display.start(self.step, steps)
        try:
            with StopRequest(say=self.group.is_first) as stop:
                while self.step < steps and reason == "done":
                    began = time.perf_counter()
                    tokens = self._train_step()
                    seconds = time.perf_counter() - began
                    trained_tokens, trained_seconds = trained_tokens + tokens, trained_seconds + seconds
                    self._report_step(tokens, seconds)
                    if self._is_due(self.config.evaluation.every) or self.step == steps:
                        self.evaluate()
                    if self.config.evaluation.sample_every and self._is_due(self.config.evaluation.sample_every):
                        self.sample()
                    received = self.group.largest(stop.received or 0)
                    if received:
                        reason = signal.Signals(received).name
                    elif self.is_out_of_patience:
                        reason = "early stop"
                    elif self.group.largest(time.monotonic() > deadline) and self.step < steps:
                        reason = "out of time"
                    elif self._is_due(self.config.checkpoint.every) or self._is_new_best():
                        self.save()
                if self._saved_at != self.step:
                    self.save()
                self.writer.wait()
                self.group.barrier()
        finally:
            self.display.stop()
        speed = trained_tokens / max(trained_seconds, 1e-9)
        self.journal.write("end", step=self.step, reason=reason, tokens_per_second=speed)
        return TrainResult(reason, self.step, self.train_loss, self.val_loss, self.best_val_loss, speed)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many evaluations in a row were no better than the best that training ends early."""
        return is_out_of_patience(self.evaluations_since_best, self.config)

    def evaluate(self) -> float | None:
        """Mean loss over fixed samples of the validation split; None without one. Draws no random numbers."""
        if self.val_loader is None:
            return None
        total, weights = 0.0, 0.0
        batches = self.val_loader.evaluation_batches(self.config.evaluation.windows)
        with torch.no_grad(), evaluating(self.model), autocast(self.device, self.precision), self._outside_training():
            while together := list(itertools.islice(batches, self.group.world_size)):  # one for each process
                if self.group.rank < len(together):
                    batch, weight = together[self.group.rank]
                elif self.shards is None:
                    continue
                else:  # nothing is left for this process, but the others want its part of the weights
                    batch, weight = together[0][0], 0
                arguments, options = forward_arguments(batch, self.device)
                loss = self._loss(self.model, arguments, options)
                total, weights = total + loss.item() * weight, weights + weight
        total, weights = self.group.sum(total, weights)
        self.val_loss = total / weights
        if self.best_val_loss is None or self.val_loss < self.best_val_loss:
            self.best_val_loss, self.evaluations_since_best = self.val_loss, 0
        else:
            self.evaluations_since_best += 1
        size = self.val_loader.bytes_per_token
        bits = None if size is None else bits_per_byte(self.val_loss, size)
        self._log("eval", val_loss=self.val_loss, **({} if bits is None else {"bits_per_byte": bits}))
        self.display.evaluation(self.step, self.val_loss, bits)
        return self.val_loss

    def sample(self) -> str:
        """The first process continues the prompt, with a generator of its own: training is the same without it."""
        if not self.group.is_first and self.shards is None:  # sharded, all do the same
            return ""
        settings = self.config.evaluation
        prompt = (self.tokenizer.begin + self.tokenizer.encode(settings.prompt))[-self.model.config.block_size :] or [0]
        generator = torch.Generator(self.device).manual_seed(self.config.training.seed + self.step)
        idx = torch.tensor([prompt], device=self.device)
        with autocast(self.device, self.precision), self._outside_training():
            ids = self.model.generate(idx, settings.sample_tokens, temperature=0.8, top_k=50, generator=generator)
        text = self.tokenizer.decode(ids[0].tolist())
        self.journal.write("sample", step=self.step, text=text)
        self.display.note(f"step {self.step} sample: {text}")
        return text

    def save(self) -> None:
        """Write a checkpoint of this step, in the background."""
        state = self.state_dict()
        weights = None if self.shards is None else self.shards.weights()
        if self.group.is_first:
            self.writer.save(self.model, state, self.step, self.val_loss, weights)
        self._saved_at = self.step
        self.journal.write("checkpoint", step=self.step)

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the model's weights; with several processes, all must ask."""
        optimizer = self.optimizer.state_dict()
        return {
            "step": self.step,
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "evaluations_since_best": self.evaluations_since_best,
            "optimizer": optimizer if self.shards is None else self.shards.gathered(optimizer),
            "data": self.train_loader.state_dict(),
            "rng": self.group.gather(rng_state()),
            "hidden": None if self.hidden is None else self.group.gather(self.hidden.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; the weights have been loaded with the model."""
        self.step = self._saved_at = state["step"]
        for name in ("train_loss", "val_loss", "best_val_loss", "evaluations_since_best"):
            setattr(self, name, state[name])
        optimizer = state["optimizer"]
        wanted = [
            {name: group[name] for name in ("betas", "eps", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(optimizer if self.shards is None else self.shards.scattered(optimizer))
        for group, settings in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(settings)  # the config's, which the run may be resumed with other ones of
        self.train_loader.load_state_dict(state["data"])
        if self.hidden is not None:
            self.hidden.load_state_dict(
                state["hidden"], self.config.training.batch_size, self.group.rank, self.group.world_size, self.device
            )
        if len(state["rng"]) == self.group.world_size:
            set_rng_state(state["rng"][self.group.rank])
        else:  # another number of processes: the data go on where they were, dropout is drawn anew
            torch.manual_seed(self.config.training.seed + self.step + self.group.rank)

    def _train_step(self) -> int:
        """One optimizer step over grad_accum batches; returns the number of tokens."""
        settings = self.config.training
        lr = learning_rate(self.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=self.device)
        tokens = 0
        position = self.train_loader.samples
        for i, (batch, factor) in enumerate(self._weighted_batches()):
            arguments, options = forward_arguments(batch, self.device)
            if factor != 1:
                options["factor"] = factor
            last = i == settings.grad_accum - 1
            if self.shards is not None:
                self.averaging.set_requires_gradient_sync(last)
            averages = last or self.shards is not None
            with contextlib.nullcontext() if averages else self.group.not_yet_averaging(self.averaging):
                run = self._pass if self.recorded is None or options else self.recorded
                loss_sum += run(*arguments, **options)
            tokens += arguments[0].numel() * self.group.world_size
        loss_sum = self.group.mean(loss_sum)
        max_norm = settings.grad_clip or math.inf
        if self.shards is None:
            norm, scale = clip_grad_norm(self.model.parameters(), max_norm)
        else:
            self.shards.take_gradients()
            norm, scale = self.shards.clip_grad_norm(max_norm)
        self.train_loss, self.grad_norm, self.lr = loss_sum.item() / settings.grad_accum, norm.item(), lr
        if not (math.isfinite(self.train_loss) and math.isfinite(self.grad_norm)):
            self._stop_non_finite(position)
        self.optimizer.step(grad_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.val_loss = None
        return tokens

    def _weighted_batches(self) -> Iterable[tuple[Batch, float]]:
        """This process's batches of one step, each with a factor on its loss: its weight over the mean weight. With
        them the mean over the batches of all processes is the one over all targets, however these are shared out."""
        count, processes = self.config.training.grad_accum, self.group.world_size
        batches = (self.train_loader.next_batch() for _ in range(count))
        first = next(batches)
        if count * processes == 1 or self.train_loader.weight(first) is None:  # read one by one while the GPU computes
            return ((batch, 1.0) for batch in itertools.chain([first], batches))
        held = [first, *batches]
        weights = [self.train_loader.weight(batch) or 0.0 for batch in held]
        (total,) = self.group.sum(sum(weights))
        mean = total / (count * processes) or 1.0
        return [(batch, weight / mean) for batch, weight in zip(held, weights, strict=True)]

    def _can_record(self) -> bool:
        """Whether a pass may become a CUDA graph: it then waits for nothing, and is always the same."""
        settings = self.config.training
        alone = self.group.world_size == 1 and not settings.compile and not settings.gradient_checkpointing
        return settings.cuda_graph and self.device.type == "cuda" and type(self.model) is GPT and alone

    def _pass(self, *arguments: torch.Tensor, factor: float = 1.0, **options: Any) -> torch.Tensor:
        """Forward and backward pass of one batch; the loss, times a factor, detached."""
        with autocast(self.device, self.precision):
            loss = self._loss(self.forward, arguments, options)
        if factor != 1:
            loss = loss * factor
        (loss / self.config.training.grad_accum).backward()
        return loss.detach()

    def _loss(self, forward: Any, arguments: Any, options: dict[str, Any]) -> torch.Tensor:
        if self.hidden is None:
            return forward(*arguments, **options)[1]
        return self.hidden.loss(forward, *arguments, **options)

    def _stop_non_finite(self, position: int) -> None:
        self.writer.wait()
        last = (
            "there is no checkpoint before it"
            if self._saved_at is None
            else f"the checkpoint before it is of step {self._saved_at}"
        )
        raise NonFiniteLossError(
            f"step {self.step + 1}: loss {self.train_loss}, gradient norm {self.grad_norm}, lr {self.lr:g}, "
            f"at data position {position} "
            f"(samples since the start); {last}. A lower training.lr or a longer training.warmup_steps often helps."
        )

    def _report_step(self, tokens: int, seconds: float) -> None:
        speed = tokens / max(seconds, 1e-9)
        peak = self.peak_flops and self.peak_flops * self.group.world_size
        mfu = speed * self.flops_per_token / peak if peak else None
        assert self.train_loss is not None
        self._log(
            "step",
            loss=self.train_loss,
            lr=self.lr,
            grad_norm=self.grad_norm,
            tokens=tokens,
            tokens_per_second=speed,
            mfu=mfu,
        )
        self.display.step(self.step, self.train_loss, tokens)

    def _log(self, kind: str, **values: Any) -> None:
        self.journal.write(kind, step=self.step, **values)
        for tracker in self.trackers:
            tracker.log(self.step, {f"{kind}/{k}": v for k, v in values.items() if v is not None})

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _is_new_best(self) -> bool:
        return self.config.checkpoint.keep_best and self.val_loss is not None and self.evaluations_since_best == 0

    def _outside_training(self) -> contextlib.AbstractContextManager[Any]:
        """Where the model is called other than for a step."""
        return contextlib.nullcontext() if self.shards is None else self.shards.gathering()


def is_out_of_patience(evaluations_since_best: int, config: RunConfig) -> bool:
    """Whether a run ends early after so many evaluations without a better one."""
    return 0 < config.evaluation.patience <= evaluations_since_best


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss as bits per byte of text, which does not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token


def resolve_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda", "cuda:1", …; ValueError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, or cuda[:number], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} was asked for, and torch sees {torch.cuda.device_count()} CUDA GPUs")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16" for a config's precision on a device."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return name
