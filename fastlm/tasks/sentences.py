"""Sentences as vectors whose angle says how much two of them mean the same (Reimers & Gurevych, arXiv:1908.10084)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlm.data import Tokenizer, load_tokenizer
from fastlm.data.examples import pack
from fastlm.data.special import special_ids
from fastlm.models.encoder import Encoder
from fastlm.nn.modes import evaluating
from fastlm.nn.packing import pool


@torch.no_grad()
def embed_sentences(
    model: Encoder, tokenizer: Tokenizer | Path | str, texts: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """The mean of each text's token vectors, of length 1: (N, C) float32 on the CPU. Their products are cosines.

    Args:
        tokenizer: or the folder that it is in.
        texts: cut on the right to what the model can read.
        batch_size: texts in one forward pass; packed, so that nothing is padded.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    special = special_ids(tokenizer)
    ids = [torch.tensor(special.frame(row.tolist(), model.config.block_size)) for row in
           tokenizer.encode_batch(list(texts))]  # fmt: skip
    parts = []
    with evaluating(model):
        for i in range(0, len(ids), batch_size):
            packed, cu_seqlens, longest = pack(ids[i : i + batch_size])
            cu_seqlens = cu_seqlens.to(model.device)
            hidden = model.hidden_states(packed.to(model.device), cu_seqlens=cu_seqlens, max_seqlen=longest)
            parts.append(F.normalize(pool(hidden, cu_seqlens, "mean").float(), dim=1).cpu())
    return torch.cat(parts)
