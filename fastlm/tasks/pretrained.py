"""What every task begins with: a pretrained model, its tokenizer, and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm.data import Tokenizer, load_tokenizer
from fastlm.models.encoder import Encoder
from fastlm.models.gpt import GPT
from fastlm.models.huggingface import model_from_pretrained
from fastlm.models.huggingface.load import read_config
from fastlm.models.lora import add_lora, has_lora, has_targets, merge, rank_and_alpha, remove_lora
from fastlm.training.config import LoraConfig
from fastlm.training.loading import check_vocabulary, load_found

NEW = "new"  # as the model: begin with new weights, for the tasks that can


def check_adapters(model: GPT | Encoder, lora: LoraConfig, where: Path) -> None:
    """ValueError where the adapters in a checkpoint are other ones than the settings ask for."""
    rank, alpha = rank_and_alpha(model)
    if rank != lora.rank or (rank and alpha != lora.alpha):
        raise ValueError(
            f"the checkpoint {where} has LoRA adapters of rank {rank} and alpha {alpha:g}, the settings ask for rank "
            f"{lora.rank} and alpha {lora.alpha:g}; rank 0 means none"
        )
    if rank and not has_targets(model, lora.targets):
        raise ValueError(
            f"the checkpoint {where} has LoRA adapters beside other projections than {lora.targets!r} names"
        )


def open_pretrained(path: Path, which: str = "best") -> tuple[Path, Tokenizer]:
    """The folder of the weights of a run, a checkpoint or a model folder, and the tokenizer.

    Raises:
        FileNotFoundError: there is none of these.
        ValueError: the model is of a kind that no task begins with.
    """
    fields, weights, tokenizer = load_found(path, which, read_config)
    kind = fields.get("model_type")
    if str(kind).startswith("fastlm-") and kind != "fastlm-encoder":
        raise ValueError(
            f"{path} holds a {kind}, made for its own task; wanted a pretrained model: causal (GPT) or masked (Encoder)"
        )
    return weights, load_tokenizer(tokenizer)


def trained_model(path: Path, lora: LoraConfig, dropout: float = -1.0, from_scratch: bool = False) -> GPT | Encoder:
    """The model to train: its weights, or the same shape with new ones; with adapters where `lora` asks for them.

    Args:
        dropout: in the whole model; -1: what its folder says.
    """
    _, tokenizer = open_pretrained(path)
    changes: dict[str, Any] = {} if dropout < 0 else {"dropout": dropout, "attention_dropout": dropout}
    model, weights, _ = load_found(path, "best", lambda folder: model_from_pretrained(folder, **changes))
    if not isinstance(model, (GPT, Encoder)):
        raise ValueError(f"{path} holds a {type(model).__name__}; fine-tuning begins with a GPT or an Encoder")
    check_vocabulary(model.config.vocab_size, tokenizer.vocab_size, weights, path)
    if has_lora(model):  # of an earlier fine-tuning: part of the weights now
        merge(model)
        remove_lora(model)
    if from_scratch:
        model.reset_parameters()
    if lora.rank:
        add_lora(model, lora.rank, lora.alpha, lora.targets)
    return model.train()
