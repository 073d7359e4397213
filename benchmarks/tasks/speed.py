"""Tokens a second of masked training and of fine-tuning, beside causal pretraining of the same size, in turns.

    python benchmarks/tasks/speed.py --out speed.json

One shape for all: 4 layers, 256 wide, 128 tokens, a vocabulary of 8,192. Causal and masked: 16 windows of 128 tokens.
Fine-tuning to classes on both models: 2,048 tokens in packed sequences of 8 to 128 tokens, and, to see what packing is
worth, the same sequences padded to 128 (the padding is computed, and does not count as tokens). A step is forward,
backward, clipping and AdamW. The medians are over rounds in which each has one step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fastlm
from fastlm.data.examples import pack
from fastlm.data.masking import Masker
from fastlm.models.classifier import Classifier, ClassifierConfig
from fastlm.training.config import OptimizerConfig
from fastlm.training.optimizer import make_optimizer

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "vocab_size": 8192}
ROWS, LENGTH = 16, 128


def step_of(model: torch.nn.Module, *arguments: torch.Tensor, **packing: object) -> Callable[[], None]:
    optimizer = make_optimizer(model.train(), OptimizerConfig(), 1e-4)

    def step() -> None:
        _, loss = model(*arguments, **packing)
        loss.backward()
        _, scale = fastlm.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad(set_to_none=True)

    return step


def contenders() -> dict[str, tuple[Callable[[], None], int]]:
    """Name -> (a step, its tokens)."""
    torch.manual_seed(0)
    idx = torch.randint(0, 8000, (ROWS, LENGTH + 1))
    encoder = fastlm.EncoderConfig(**SHAPE, mask_token_id=8191)
    masker = Masker(8191, torch.arange(8192) < 8191, None)
    lengths = np.random.default_rng(0).integers(8, LENGTH + 1, 64)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), ROWS * LENGTH)) + 1]
    packed, starts, longest = pack([torch.randint(0, 8000, (int(n),)) for n in lengths])
    labels = torch.randint(0, 2, (len(lengths),))
    config = ClassifierConfig(("a", "b"))
    out = {
        "causal": (step_of(fastlm.GPT(fastlm.GPTConfig(**SHAPE)), idx[:, :-1], idx[:, 1:]), ROWS * LENGTH),
        "masked": (step_of(fastlm.Encoder(encoder), *masker(idx[:, :-1], torch.Generator())), ROWS * LENGTH),
    }
    for name, model in (("causal", fastlm.GPT(fastlm.GPTConfig(**SHAPE))), ("masked", fastlm.Encoder(encoder))):
        step = step_of(Classifier(model, config), packed, labels, cu_seqlens=starts, max_seqlen=longest)
        out[f"classes, {name} model, packed"] = step, int(lengths.sum())
    padded = torch.randint(0, 8000, (len(lengths), LENGTH))
    step = step_of(Classifier(fastlm.Encoder(encoder), config), padded, labels)
    out["classes, masked model, padded"] = step, int(lengths.sum())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    steps = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, (step, _) in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    speed = {name: tokens / float(np.median(seconds[name])) for name, (_, tokens) in steps.items()}
    for name, value in speed.items():
        print(f"{name:32} {value:10,.0f} tok/s   {value / speed['causal']:.2f} of causal")
    if args.out:
        result = {"threads": torch.get_num_threads(), "tokens_per_second": speed, "seconds": seconds}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
