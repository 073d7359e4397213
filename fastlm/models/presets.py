"""Named configurations: `GPTConfig.preset(name)`.

`nano` and `micro` are nanoGPT's two character-level shapes (for a CPU and for a GPU) with a vocabulary of bytes; the
GPT-2 sizes are those of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), as in the
published checkpoints; the Llama-family shapes are those of the config.json of the models named.
"""

from __future__ import annotations

from typing import Any

_BYTES: dict[str, Any] = {"vocab_size": 256, "bias": False}

_LLAMA: dict[str, Any] = {
    "norm": "rms_norm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
}

_LLAMA_3_ROPE: dict[str, Any] = {
    "kind": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_block_size": 8192,
}

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {**_BYTES, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "micro": {**_BYTES, "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "llama-nano": {**_LLAMA, **_BYTES, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 128, "block_size": 64},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "smollm2-135m": {
        **_LLAMA,
        "n_layer": 30,
        "n_head": 9,
        "n_kv_head": 3,
        "n_embd": 576,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "block_size": 8192,
        "rope_theta": 100000.0,
        "tie_embeddings": True,
    },
    "qwen2.5-0.5b": {
        **_LLAMA,
        "n_layer": 24,
        "n_head": 14,
        "n_kv_head": 2,
        "n_embd": 896,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "block_size": 32768,
        "rope_theta": 1000000.0,
        "norm_eps": 1e-6,
        "qkv_bias": True,
        "tie_embeddings": True,
    },
    "qwen3-0.6b": {
        **_LLAMA,
        "n_layer": 28,
        "n_head": 16,
        "n_kv_head": 8,
        "n_embd": 1024,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "block_size": 40960,
        "rope_theta": 1000000.0,
        "norm_eps": 1e-6,
        "qk_norm": True,
        "tie_embeddings": True,
    },
    "tinyllama-1.1b": {
        **_LLAMA,
        "n_layer": 22,
        "n_head": 32,
        "n_kv_head": 4,
        "n_embd": 2048,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "block_size": 2048,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "n_layer": 16,
        "n_head": 32,
        "n_kv_head": 8,
        "n_embd": 2048,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "block_size": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
        "tie_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "n_layer": 32,
        "n_head": 32,
        "n_kv_head": 8,
        "n_embd": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "block_size": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0},
    },
}
