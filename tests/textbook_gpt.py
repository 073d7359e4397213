"""GPT as a textbook writes it, in plain PyTorch, from the parameters of a `fastlm.GPT`: what the model is held to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}


def logits(model: fastlm.GPT, idx: Tensor) -> Tensor:
    """idx (B, T) -> (B, T, V)."""
    config, weights = model.config, dict(model.named_parameters())
    steps = idx.shape[1]
    h = weights["wte.weight"][idx]
    if config.position == "learned":
        h = h + weights["wpe.weight"][:steps]
    if config.position == "sinusoidal":
        h = h * math.sqrt(config.n_embd) + _sinusoids(steps, config.n_embd)
    for layer in range(config.n_layer):
        here = f"blocks.{layer}."
        h = h + _attention(config, weights, here + "attention.", _norm(config, weights, here + "norm_1", h))
        h = h + _mlp(config, weights, here + "mlp.", _norm(config, weights, here + "norm_2", h))
    y = _norm(config, weights, "norm", h)
    z = y @ weights.get("lm_head.weight", weights["wte.weight"]).T
    return config.logit_softcap * torch.tanh(z / config.logit_softcap) if config.logit_softcap else z


def _norm(config, weights, name, h):
    weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
    if config.norm == "rms_norm":
        return h / torch.sqrt((h * h).mean(-1, keepdim=True) + config.norm_eps) * weight
    return F.layer_norm(h, h.shape[-1:], weight, bias, config.norm_eps)


def _attention(config, weights, name, x):
    batch, steps, _ = x.shape
    heads, kv_heads, width = config.n_head, config.kv_heads, config.head_size
    qkv = F.linear(x, weights[name + "qkv.weight"], weights.get(name + "qkv.bias"))
    q, k, v = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
    q = q.view(batch, steps, heads, width).transpose(1, 2)  # (B, H, T, D)
    k = k.view(batch, steps, kv_heads, width).transpose(1, 2)
    v = v.view(batch, steps, kv_heads, width).transpose(1, 2)
    if config.qk_norm:
        q, k = (
            t / torch.sqrt((t * t).mean(-1, keepdim=True) + config.norm_eps) * weights[f"{name}{which}_norm.weight"]
            for which, t in (("q", q), ("k", k))
        )
    if config.position == "rotary":
        q, k = _rotate(q, config), _rotate(k, config)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (config.attention_scale or width**-0.5)
    if config.attention_softcap:
        scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
    distance = torch.arange(steps)[:, None] - torch.arange(steps)
    if config.position == "alibi":  # for a power of two
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])
        scores = scores - slopes[:, None, None] * distance
    hidden = distance < 0
    if config.sliding_window is not None:
        hidden = hidden | (distance >= config.sliding_window)
    y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(batch, steps, heads * width)
    return F.linear(y, weights[name + "proj.weight"], weights.get(name + "proj.bias"))


def _rotate(x, config):
    """As complex numbers: dimension i is the real part and i + D/2 the imaginary part."""
    real, imaginary = x.chunk(2, dim=-1)
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_size, 2) / config.head_size)
    angles = torch.arange(x.shape[2])[:, None] * frequencies
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _mlp(config, weights, name, x):
    inner = F.linear(x, weights[name + "fc.weight"], weights.get(name + "fc.bias"))
    act = ACTIVATIONS[config.activation]
    if config.activation in ("swiglu", "geglu"):
        gate, up = inner.chunk(2, dim=-1)
        inner = act(gate) * up
    else:
        inner = act(inner)
    return F.linear(inner, weights[name + "proj.weight"], weights.get(name + "proj.bias"))


def _sinusoids(steps, width):
    table = torch.empty(steps, width)
    for position in range(steps):
        for i in range(0, width, 2):
            angle = position / 10000 ** (i / width)
            table[position, i], table[position, i + 1] = math.sin(angle), math.cos(angle)
    return table
