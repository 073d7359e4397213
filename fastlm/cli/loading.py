"""A model and its tokenizer, from a run, a checkpoint or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.data import Tokenizer
    from fastlm.models.gpt import GPT


def load_model(
    path: Path, *, tokenizer: Path | None = None, which: str = "best", device: str = "auto"
) -> tuple[GPT, Tokenizer]:
    """The model on its device, in eval mode, and its tokenizer.

    Args:
        path: a run folder, a checkpoint in one, or a Hugging Face model folder.
        tokenizer: where its tokenizer is, when not in the folder itself.
        which: which checkpoint of a run: "best" or "last".
    """
    from fastlm.data import load_tokenizer
    from fastlm.models.gpt import GPT
    from fastlm.training.checkpoint import INFO, open_checkpoint
    from fastlm.training.run import CONFIG, choose_checkpoint
    from fastlm.training.trainer import resolve_device

    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path} (wanted a run, a checkpoint, or a model folder)")
    if (path / CONFIG).is_file():
        model_path, tokenizer_path = choose_checkpoint(path, which).model_path, path / "tokenizer"
    elif (path / INFO).is_file():
        model_path, tokenizer_path = open_checkpoint(path).model_path, path.parent.parent / "tokenizer"
    elif (path / "config.json").is_file():
        model_path, tokenizer_path = path, path
    else:
        raise FileNotFoundError(
            f"{path} is no run ({CONFIG}), no checkpoint ({INFO}) and no model folder (config.json)"
        )
    loaded = load_tokenizer(tokenizer or tokenizer_path)
    model = GPT.from_pretrained(model_path).to(resolve_device(device)).eval()
    if loaded.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer or tokenizer_path} has {loaded.vocab_size} ids, "
            f"the model {model_path} knows only {model.config.vocab_size}: they do not belong together"
        )
    return model, loaded
