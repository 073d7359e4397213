"""AdamW with the usual two groups: matrices are decayed, vectors are not."""

from __future__ import annotations

from typing import Any

import torch

from fastlm.optim import AdamW
from fastlm.training.config import OptimizerConfig


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that want gradients: those with two or more dimensions decayed; biases and norm weights not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig, lr: float) -> AdamW:
    """AdamW over the two groups; a group without parameters is left out."""
    groups = [g for g in parameter_groups(model, config.weight_decay) if g["params"]]
    return AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps)
