"""Hugging Face's model folders, in and out: config.json beside safetensors."""

from fastlm.models.huggingface.load import from_pretrained
from fastlm.models.huggingface.save import save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
