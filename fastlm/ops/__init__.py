"""The ops: one contract each, many backends. See `fastlm.ops.registry` for how a backend is chosen."""

from fastlm.ops.layer_norm import layer_norm, rms_norm
from fastlm.ops.registry import explain

__all__ = ["explain", "layer_norm", "rms_norm"]
