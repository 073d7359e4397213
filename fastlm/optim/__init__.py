"""The optimizer: AdamW in one pass over memory, and gradient clipping that costs no pass of its own."""

from fastlm.optim.adamw import AdamW
from fastlm.optim.clip import GradNorm, clip_grad_norm

__all__ = ["AdamW", "GradNorm", "clip_grad_norm"]
