"""A causal model and its tokenizer, from a run, a checkpoint or a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastlm.data import Tokenizer
    from fastlm.models.gpt import GPT
    from fastlm.models.lstm import LSTMLM

DTYPES = ("auto", "float32", "bfloat16", "float16")  # auto: as they are stored


def torch_dtype(name: str) -> torch.dtype | str:
    """What `from_pretrained` takes for one of DTYPES."""
    import torch

    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return name if name == "auto" else getattr(torch, name)


def load_model(
    path: Path,
    *,
    tokenizer: Path | None = None,
    which: str = "best",
    dtype: str = "float32",
    device: str = "auto",
) -> tuple[GPT | LSTMLM, Tokenizer]:
    """The model on its device, in eval mode, and its tokenizer, which begins texts as the model knows it.

    Args:
        path: a run folder, a checkpoint in one, or a Hugging Face model folder.
        tokenizer: where its tokenizer is, when not in the folder itself.
        which: which checkpoint of a run: "best" or "last".
        dtype: of the weights, one of DTYPES.
    """
    from fastlm.data import load_tokenizer
    from fastlm.models.huggingface import causal_from_pretrained
    from fastlm.training.loading import check_vocabulary, load_found
    from fastlm.training.trainer import resolve_device

    def load(weights: Path) -> GPT | LSTMLM:
        return causal_from_pretrained(weights, dtype=torch_dtype(dtype), device=resolve_device(device)).eval()

    model, model_path, tokenizer_path = load_found(path, which, load)
    published = tokenizer_path == model_path  # a model folder, not a run
    tokenizer_path = tokenizer or tokenizer_path
    loaded = load_tokenizer(tokenizer_path)
    if published:
        loaded.begin_as_published()
    check_vocabulary(model.config.vocab_size, loaded.vocab_size, model_path, tokenizer_path)
    return model, loaded


def end_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: the tokenizer's end of text, and what the model folder's generation_config.json or
    config.json names, such as the end of a turn of a chat model."""
    ends = [] if tokenizer.eot is None else [tokenizer.eot]
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends += [named] if isinstance(named, int) else named or []
    return list(dict.fromkeys(ends))
