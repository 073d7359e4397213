"""nanoGPT's CPU recipe, trained twice in one run, in turns: fastlm, and the same model in eager PyTorch.

    python benchmarks/nanogpt.py ../shared/data/text/tinyshakespeare.txt --out docs/results/nanogpt.json

4 layers, 4 heads, 128 wide, 64 characters, 12 windows a step, 2,000 steps, no dropout, nanoGPT's optimizer settings
but for a higher learning rate (recipes/shakespeare-char-cpu.toml).
Both begin with the same weights and see the same windows. The peer is a GPT-2 as nanoGPT writes it: nn.Linear,
nn.LayerNorm without bias, exact GELU, F.scaled_dot_product_attention, all logits and their cross-entropy,
torch.optim.AdamW in two groups, and clip_grad_norm_; with --textbook there is a third one, with an explicit softmax.

The models take turns of 50 steps, so that what disturbs the machine disturbs both. The times are those of the training
steps alone, from taking the batch to the optimizer's step.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlm
from fastlm.bench import report
from fastlm.bench.textbook import TextbookGPT
from fastlm.data import TokenData, WindowLoader
from fastlm.data.pipeline import PrepareOptions, prepare_files
from fastlm.models.gpt import GPTConfig
from fastlm.training.config import OptimizerConfig, TrainingConfig
from fastlm.training.optimizer import make_optimizer, parameter_groups
from fastlm.training.schedule import learning_rate

TURN = 50  # steps
SETTINGS = TrainingConfig(lr=4e-3, min_lr_ratio=0.02, warmup_steps=100, batch_size=12, seed=1337)
OPTIMIZER = OptimizerConfig(beta1=0.9, beta2=0.99, weight_decay=0.1)


def fastlm_step(model: fastlm.GPT) -> Callable[[torch.Tensor, torch.Tensor, float], float]:
    """The training step as `fastlm.training` makes it."""
    optimizer = make_optimizer(model, OPTIMIZER, SETTINGS.lr)

    def step(x: torch.Tensor, y: torch.Tensor, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        _, loss = model(x, y)
        loss.backward()
        _, scale = fastlm.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def eager_step(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor, float], float]:
    """The training step as nanoGPT makes it on a CPU."""
    groups = parameter_groups(model, OPTIMIZER.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2))

    def step(x: torch.Tensor, y: torch.Tensor, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


@torch.no_grad()
def validation_loss(model: nn.Module, val: WindowLoader) -> float:
    """The mean loss over the whole validation split, in windows that do not overlap."""
    batches = list(val.evaluation_batches(val.data.tokens // val.block_size))
    model.eval()
    losses = [model(x, y)[1].item() * weight for (x, y), weight in batches]
    model.train()
    return sum(losses) / sum(weight for _, weight in batches)


def run(text: Path, steps: int, textbook: bool) -> dict[str, Any]:
    """Train all models; for each its losses and seconds."""
    SETTINGS.steps = steps
    with tempfile.TemporaryDirectory() as folder:
        prepare_files([text], Path(folder) / "data", PrepareOptions("chars"))
        train, val = (TokenData.open(Path(folder) / "data", split) for split in ("train", "val"))
        config = GPTConfig(
            vocab_size=train.vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False, activation="gelu"
        )
        torch.manual_seed(SETTINGS.seed)
        ours = fastlm.GPT(config)
        models: dict[str, nn.Module] = {"fastlm": ours, "eager": TextbookGPT(config, sdpa=True)}
        if textbook:
            models["textbook attention"] = TextbookGPT(config)
        for model in models.values():
            model.load_state_dict(ours.state_dict())
        step_of = {n: fastlm_step(ours) if n == "fastlm" else eager_step(m) for n, m in models.items()}
        loaders = {n: WindowLoader(train, SETTINGS.batch_size, 64, seed=SETTINGS.seed) for n in models}
        results: dict[str, dict[str, Any]] = {n: {"seconds": 0.0, "losses": []} for n in models}
        for begin in range(0, steps, TURN):
            for name in list(models) if begin // TURN % 2 == 0 else list(models)[::-1]:
                result = results[name]
                started = time.perf_counter()
                for i in range(begin, min(begin + TURN, steps)):
                    loss = step_of[name](*loaders[name].next_batch(), learning_rate(i, SETTINGS))
                    result["losses"].append(loss)
                result["seconds"] += time.perf_counter() - started
            report.progress(f"step {min(begin + TURN, steps)}/{steps}")
        report.progress("")
        for name, model in models.items():
            results[name]["val_loss"] = validation_loss(model, WindowLoader(val, 64, 64))
            assert math.isfinite(results[name]["val_loss"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--textbook", action="store_true", help="a third model, with attention by explicit softmax")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    where = report.environment()
    results = run(options.text, options.steps, options.textbook)
    print(f"{'':20} {'validation':>10} {'seconds':>9} {'ms a step':>10} {'speed-up':>9}")
    for name, result in results.items():
        seconds = result["seconds"]
        ratio = results["eager"]["seconds"] / seconds
        per_step = 1000 * seconds / options.steps
        print(f"{name:20} {result['val_loss']:10.4f} {seconds:9.1f} {per_step:10.2f} {ratio:8.2f}x")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": where, "steps": options.steps, "results": results}
        options.out.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
