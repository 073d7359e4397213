"""Hugging Face's model folders, in and out: config.json beside safetensors."""

from fastlm.models.huggingface.load import encoder_from_pretrained, from_pretrained, model_from_pretrained
from fastlm.models.huggingface.save import save_pretrained

__all__ = ["encoder_from_pretrained", "from_pretrained", "model_from_pretrained", "save_pretrained"]
