"""Models: GPT and its configuration."""

from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
