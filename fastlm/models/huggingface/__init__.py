"""Hugging Face's model folders, in and out: config.json beside safetensors."""

from fastlm.models.huggingface.load import (
    causal_from_pretrained,
    encoder_from_pretrained,
    from_pretrained,
    model_from_pretrained,
)
from fastlm.models.huggingface.save import save_pretrained

__all__ = [
    "causal_from_pretrained",
    "encoder_from_pretrained",
    "from_pretrained",
    "model_from_pretrained",
    "save_pretrained",
]
