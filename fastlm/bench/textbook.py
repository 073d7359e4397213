"""GPT-2 as a textbook writes it in PyTorch: what fastlm is measured against, and checked against, in the same run.

Explicit softmax over all scores, nn.LayerNorm, nn.Linear and GELU, all logits and their cross-entropy. It has the names
of `fastlm.GPT`'s parameters, so `textbook.load_state_dict(model.state_dict())` makes the two compute the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models.gpt import GPTConfig

Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, T, D) of each layer


class Attention(nn.Module):
    mask: Tensor

    def __init__(self, config: GPTConfig, sdpa: bool) -> None:
        super().__init__()
        self.n_head, self.sdpa = config.n_head, sdpa
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.has_bias("qkv"))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.has_bias("attention"))
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            if len(cache) > layer:
                k, v = torch.cat((cache[layer][0], k), 2), torch.cat((cache[layer][1], v), 2)
                cache[layer] = k, v
            else:
                cache.append((k, v))
        length, columns = q.shape[2], k.shape[2]
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        else:
            scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5  # (B, H, T, S)
            seen = self.mask[columns - length : columns, :columns]
            y = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.has_bias("mlp"))
        self.proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.has_bias("mlp"))
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, sdpa: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.has_bias("norm"))
        self.attention = Attention(config, sdpa)
        self.norm_2 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.has_bias("norm"))
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.attention(self.norm_1(x), cache, layer)
        return x + self.mlp(self.norm_2(x))


class TextbookGPT(nn.Module):
    """GPT-2's architecture only.

    Args:
        sdpa: attention by F.scaled_dot_product_attention instead of an explicit softmax.

    Raises:
        ValueError: the configuration is not one of GPT-2's family.
    """

    def __init__(self, config: GPTConfig, sdpa: bool = False) -> None:
        super().__init__()
        _check(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, sdpa) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.has_bias("norm"))

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V), and the mean loss where there are targets. A cache is added to."""
        past = cache[0][0].shape[2] if cache else 0
        x = self.wte(idx) + self.wpe(torch.arange(past, past + idx.shape[1], device=idx.device))
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        logits = F.linear(self.norm(x), self.wte.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """The likeliest continuation."""
        cache: Cache = []
        logits, _ = self(idx, cache=cache)
        for _ in range(max_new_tokens - 1):
            idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)
            logits, _ = self(idx[:, -1:], cache=cache)
        return torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)


def _check(config: GPTConfig) -> None:
    if config.activation not in ("gelu", "gelu_tanh"):
        raise ValueError(
            f"the textbook model is GPT-2: activation must be gelu or gelu_tanh, got {config.activation!r}"
        )
    wanted = {"norm": "layer_norm", "qk_norm": False, "position": "learned", "tie_embeddings": True}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"the textbook model is GPT-2: {name} must be {value!r}, got {getattr(config, name)!r}")
    if config.kv_heads != config.n_head or config.sliding_window or config.attention_softcap or config.logit_softcap:
        raise ValueError("the textbook model is GPT-2: it has no grouped heads, sliding window or soft capping")
