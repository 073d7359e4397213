"""transformers' names of activations."""

from __future__ import annotations

ACTIVATIONS = {  # transformers' names -> ours; the first of each of ours is the one that is written
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def written_activation(ours: str) -> str:
    """Their name of one of ours."""
    return next(theirs for theirs, own in ACTIVATIONS.items() if own == ours)
