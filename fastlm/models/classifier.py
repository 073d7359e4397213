"""A linear layer over one vector a sequence: a causal or a masked model as a classifier."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlm.files import replace_folder, sync
from fastlm.models.encoder import Encoder
from fastlm.models.gpt import GPT
from fastlm.models.huggingface.load import model_from_pretrained, read_config
from fastlm.nn.packing import POOLINGS, pool

CLASSIFIER = "fastlm-classifier"  # model_type in config.json
_HEAD, _BACKBONE = "head.safetensors", "backbone"


@dataclass(frozen=True)
class ClassifierConfig:
    """The classes and how a sequence becomes one vector."""

    labels: tuple[str, ...]
    pooling: str = "mean"  # over the tokens; or "first" (BERT's [CLS]), "last" (what a causal model has read all of)
    dropout: float = 0.1  # of that vector
    class_weights: tuple[float, ...] | None = None  # factors on the loss of each class, as in F.cross_entropy

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"a classifier needs at least two labels, all different, got {list(self.labels)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.class_weights is not None and (
            len(self.class_weights) != len(self.labels) or not all(0 < w < math.inf for w in self.class_weights)
        ):
            raise ValueError(
                f"wanted a positive, finite weight for each of the {len(self.labels)} classes, "
                f"got {list(self.class_weights)}"
            )


class Classifier(nn.Module):
    """A model and a linear head.

    >>> model = Classifier(fastlm.Encoder.from_pretrained("minilm"), ClassifierConfig(("bad", "good")))
    >>> logits, _ = model(idx, cu_seqlens=starts, max_seqlen=longest)  # (N, K)
    """

    def __init__(self, backbone: GPT | Encoder, config: ClassifierConfig) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.head = nn.Linear(backbone.config.n_embd, len(config.labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        weights = None if config.class_weights is None else torch.tensor(config.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        unused = (backbone.head, backbone.pooler) if isinstance(backbone, Encoder) else (backbone.lm_head,)
        for module in unused:  # a step must not wait for their gradients
            if module is not None:
                module.requires_grad_(False)

    def forward(
        self,
        idx: Tensor,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (N, K), and the loss where labels are given.

        Args:
            idx: (1, T), N sequences packed into one row; or (N, T), all of one length, without cu_seqlens.
            labels: (N), int64.
            cu_seqlens, max_seqlen: as for `fastlm.ops.attention`.
        """
        if cu_seqlens is None:
            count, length = idx.shape
            cu_seqlens = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=idx.device)
            idx, max_seqlen = idx.reshape(1, -1), length
        hidden = self.backbone.hidden_states(idx, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        vectors = F.dropout(pool(hidden, cu_seqlens, self.config.pooling), self.config.dropout, self.training)
        logits = self.head(vectors)
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(logits.float(), labels, weight=self.class_weights)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Classifier:
        """Load a folder that `save_pretrained` wrote; ValueError where it holds something else."""
        folder = Path(path)
        fields = read_config(folder)
        if fields.get("model_type") != CLASSIFIER:
            raise ValueError(f"{folder} holds model_type {fields.get('model_type')!r}, wanted a {CLASSIFIER}")
        config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["config"].items()}
        backbone = model_from_pretrained(folder / _BACKBONE)
        if not isinstance(backbone, (GPT, Encoder)):
            raise ValueError(f"{folder / _BACKBONE} holds a {type(backbone).__name__}, wanted a GPT or an Encoder")
        model = cls(backbone, ClassifierConfig(**config))
        model.head.load_state_dict(load_file(folder / _HEAD))
        return model.eval()

    def save_pretrained(self, path: str | os.PathLike[str], *, format: str = "fastlm") -> None:
        """Write a folder: config.json, the head's weights, and the model's folder beside them, in its `format`."""
        with replace_folder(Path(path).resolve(), keep=lambda name: True) as new:
            fields = {"model_type": CLASSIFIER, "config": asdict(self.config)}
            (new / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            save_file({n: t.detach().cpu().contiguous() for n, t in self.head.state_dict().items()}, new / _HEAD)
            self.backbone.save_pretrained(new / _BACKBONE, format=format)
            sync(new / "config.json")
            sync(new / _HEAD)

    @property
    def gradient_checkpointing(self) -> bool:
        """That of the model."""
        return self.backbone.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.backbone.gradient_checkpointing = value

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of the model: FSDP2 gathers the weights block by block."""
        return self.backbone.blocks

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    def num_parameters(self) -> int:
        """How many numbers are learned or kept."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int | None = None) -> float:
        """Of training on one token: that of the model, whose own head does not run."""
        own: Any = self.backbone.wte.weight.numel() * 6
        if isinstance(self.backbone, GPT):
            return self.backbone.flops_per_token(length) - own
        return self.backbone.flops_per_token(length) - (0 if self.backbone.head is None else 0.15 * own)
