"""Models: GPT and Encoder, and their configurations."""

from fastlm.models.encoder import Encoder, EncoderConfig
from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "Encoder", "EncoderConfig", "GPTConfig"]
