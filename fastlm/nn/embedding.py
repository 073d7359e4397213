"""The embedding as a module: torch's, over the op, whose gradient is the same to the bit in every run."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm import ops


class Embedding(nn.Embedding):
    """torch.nn.Embedding with `fastlm.ops.embedding`. max_norm, scale_grad_by_freq and sparse are refused."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **options: object
    ) -> None:
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if options.get(name):
                raise ValueError(f"Embedding: {name}={options[name]!r} is not supported; torch.nn.Embedding has it")
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """input (...), int64 or int32, to (..., C)."""
        return ops.embedding(input, self.weight, padding_idx=self.padding_idx)
