"""fastlm: fast GPT language models in PyTorch, from hand-written C++, CUDA and Triton kernels."""

import warnings
from typing import TYPE_CHECKING, Any

from fastlm import ops
from fastlm.ops.native import IMPORT_ERROR
from fastlm.ops.registry import UnsupportedError, backend

if TYPE_CHECKING:
    from fastlm import optim
    from fastlm.models.encoder import Encoder, EncoderConfig
    from fastlm.models.gpt import GPT, GPTConfig
    from fastlm.models.lstm import LSTMLM

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "LSTMLM",
    "Encoder",
    "EncoderConfig",
    "GPTConfig",
    "UnsupportedError",
    "__version__",
    "backend",
    "ops",
    "optim",
]

if IMPORT_ERROR is not None:
    warnings.warn(f"fastlm runs without its compiled kernels: {IMPORT_ERROR}", RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    """Import the model and the optimizer on first use: the ops alone load faster."""
    if name in ("GPT", "GPTConfig", "Encoder", "EncoderConfig"):
        from fastlm import models

        return getattr(models, name)
    if name == "LSTMLM":
        from fastlm.models.lstm import LSTMLM

        return LSTMLM
    if name == "optim":
        import importlib

        return importlib.import_module("fastlm.optim")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
