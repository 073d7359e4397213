"""What a run says before its first step, which may take minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastlm.data.masking import MaskedLoader
from fastlm.models.config import GPTConfig
from fastlm.models.encoder_config import EncoderConfig
from fastlm.models.lstm import LSTMConfig

if TYPE_CHECKING:
    from fastlm.training.trainer import Trainer


def announce(trainer: Trainer) -> None:
    """Say to the display what is trained, on what, and what of the settings cannot be as they are."""
    settings, step = trainer.config.training, trainer.step
    from_step = f" from step {step}" if step else ""
    trainer.display.note(
        f"model: {_shape(trainer.model)}{trainer.model.num_parameters():,} parameters; "
        f"{settings.steps} steps of {_amount(trainer)}{from_step} on {device_name(trainer.device)}"
    )
    if settings.warmup_steps > settings.steps:
        trainer.display.note(
            f"note: training.warmup_steps={settings.warmup_steps} is more than training.steps={settings.steps}: "
            "the learning rate rises over all of them and never falls"
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _shape(model: Any) -> str:
    """Layers and width; nothing of a model that is none of ours."""
    config = getattr(getattr(model, "backbone", model), "config", None)
    if isinstance(config, LSTMConfig):
        return f"{config.num_layers} layers, {config.hidden_dim} wide, "
    if isinstance(config, (GPTConfig, EncoderConfig)):
        return f"{config.n_layer} layers, {config.n_embd} wide, "
    return ""


def _amount(trainer: Trainer) -> str:
    """What a step of all processes reads."""
    settings, loader = trainer.config.training, trainer.train_loader
    rows = settings.batch_size * settings.grad_accum * trainer.group.world_size
    if loader.bytes_per_token is not None or isinstance(loader, MaskedLoader):  # windows of a text, all of one length
        return f"{rows * loader.block_size:,} tokens"
    return f"up to {rows:,} examples"  # those of an encoder-decoder are cut by length
