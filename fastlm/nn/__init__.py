"""Modules over the ops, with torch's parameter names where torch has such a module."""

from fastlm.nn.attention import Attention, Cache
from fastlm.nn.embedding import Embedding
from fastlm.nn.mlp import MLP
from fastlm.nn.norm import LayerNorm, RMSNorm
from fastlm.nn.positions import Sinusoidal, alibi_slopes
from fastlm.nn.rotary import RopeScaling, Rotary

__all__ = [
    "MLP",
    "Attention",
    "Cache",
    "Embedding",
    "LayerNorm",
    "RMSNorm",
    "RopeScaling",
    "Rotary",
    "Sinusoidal",
    "alibi_slopes",
]
