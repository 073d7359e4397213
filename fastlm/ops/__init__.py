"""The ops: one contract each, many backends. See `fastlm.ops.registry` for how a backend is chosen."""

from fastlm.ops.adamw import adamw_
from fastlm.ops.attention import attention
from fastlm.ops.attention.qkvpacked import attention_qkvpacked
from fastlm.ops.decode_attention import decode_attention
from fastlm.ops.embedding import embedding
from fastlm.ops.grad_norm import grad_norm
from fastlm.ops.layer_norm import layer_norm, rms_norm
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.lstm import lstm
from fastlm.ops.mlp import linear_act, mlp
from fastlm.ops.registry import explain
from fastlm.ops.rotary import rotary
from fastlm.ops.sample import sample

__all__ = [
    "adamw_",
    "attention",
    "attention_qkvpacked",
    "decode_attention",
    "embedding",
    "explain",
    "grad_norm",
    "layer_norm",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "lstm",
    "mlp",
    "rms_norm",
    "rotary",
    "sample",
]
