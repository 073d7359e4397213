"""A causal model and its tokenizer, from a run, a checkpoint or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.data import Tokenizer
    from fastlm.models.gpt import GPT
    from fastlm.models.lstm import LSTMLM


def load_model(
    path: Path, *, tokenizer: Path | None = None, which: str = "best", device: str = "auto"
) -> tuple[GPT | LSTMLM, Tokenizer]:
    """The model on its device, in eval mode, and its tokenizer.

    Args:
        path: a run folder, a checkpoint in one, or a Hugging Face model folder.
        tokenizer: where its tokenizer is, when not in the folder itself.
        which: which checkpoint of a run: "best" or "last".
    """
    from fastlm.data import load_tokenizer
    from fastlm.models.huggingface import causal_from_pretrained
    from fastlm.training.loading import check_vocabulary, find_model
    from fastlm.training.trainer import resolve_device

    model_path, tokenizer_path = find_model(path, which)
    tokenizer_path = tokenizer or tokenizer_path
    loaded = load_tokenizer(tokenizer_path)
    model = causal_from_pretrained(model_path).to(resolve_device(device)).eval()
    check_vocabulary(model.config.vocab_size, loaded.vocab_size, model_path, tokenizer_path)
    return model, loaded
