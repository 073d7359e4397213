"""The whole training step, and generation: fastlm.GPT against the textbook model, torch.compile and transformers."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
from fastlm.bench import timing
from fastlm.bench.peers import library
from fastlm.bench.textbook import TextbookGPT
from fastlm.bench.timing import BASELINE, Comparison, Result, reason_of
from fastlm.models.gpt import GPTConfig

PEERS = ("fastlm", BASELINE, "sdpa", "torch.compile", "transformers")
PROMPT, NEW_TOKENS = 64, 64


@dataclass(frozen=True)
class Size:
    """A model and the batch it is trained with."""

    name: str
    config: GPTConfig
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.name} {self.batch}x{self.length}"


# A padded vocabulary (50304 = 393 * 128 instead of 50257) as everybody trains with: all peers profit from it. Biases,
# because transformers has them in any case.
SIZES = {
    "nano": Size("nano", GPTConfig.preset("nano", block_size=256, bias=True), 12, 64),
    "micro": Size("micro", GPTConfig.preset("micro", bias=True), 4, 256),
    "char": Size("char", GPTConfig.preset("micro", vocab_size=65, bias=True), 12, 256),
    "gpt2": Size("gpt2", GPTConfig.preset("gpt2", vocab_size=50304), 4, 256),
    "gpt2-long": Size("gpt2-long", GPTConfig.preset("gpt2", vocab_size=50304), 1, 1024),
    "gpt2-medium": Size("gpt2-medium", GPTConfig.preset("gpt2-medium", vocab_size=50304), 4, 256),
    "gpt2-xl": Size("gpt2-xl", GPTConfig.preset("gpt2-xl", vocab_size=50304), 4, 256),
}


def model_of(peer: str, size: Size, device: str, reference: fastlm.GPT | None = None) -> Any:
    """The peer's model, with the weights of `reference` (default: those of seed 0)."""
    if peer not in PEERS:
        raise ValueError(f"there is no peer {peer!r}; the peers are: {', '.join(PEERS)}")
    if reference is None:
        torch.manual_seed(0)
        reference = fastlm.GPT(size.config)
    if peer == "fastlm":
        return copy.deepcopy(reference).to(device)
    if peer == "transformers":
        return _transformers(reference).to(device)
    model = TextbookGPT(size.config, sdpa=peer != BASELINE).to(device)
    model.load_state_dict(reference.state_dict())
    return torch.compile(model) if peer == "torch.compile" else model


def _transformers(model: fastlm.GPT) -> nn.Module:
    transformers = library("transformers")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


class Trainer:
    """One peer's training step on one batch, always the same.

    The textbook has torch.optim.AdamW with its defaults, the other peers of PyTorch the fused one.
    """

    def __init__(
        self, peer: str, size: Size, dtype: torch.dtype, device: str, reference: fastlm.GPT | None = None
    ) -> None:
        self.peer, self.dtype, self.device = peer, dtype, device
        self.model = model_of(peer, size, device, reference)
        generator = torch.Generator().manual_seed(1)
        data = torch.randint(size.config.vocab_size, (size.batch, size.length + 1), generator=generator).to(device)
        self.idx, self.targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        if peer == "fastlm":
            self.optimizer: torch.optim.Optimizer = fastlm.optim.AdamW(self.model.parameters(), lr=1e-4)
        else:
            fused = None if peer == BASELINE else True
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.losses: list[float] = []

    def backward(self) -> Tensor:
        """Loss and gradients; low precision through autocast, the weights stay in float32."""
        low = self.dtype != torch.float32
        with torch.autocast(torch.device(self.device).type, self.dtype) if low else nullcontext():
            if self.peer == "transformers":  # it would shift the labels itself, against inputs one longer
                logits = self.model(self.idx, use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.targets.flatten())
            else:
                loss = self.model(self.idx, self.targets)[1]
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def compare_training(
    size: Size, dtype: torch.dtype, device: str, rounds: int, budget: float, skip: set[str]
) -> Comparison:
    """Time the training steps in turns. `error` is the largest relative difference of the loss at any step, and of the
    norm of the first gradients, from the reference's: our reference backend at first, then the textbook model."""
    torch.manual_seed(0)
    start = fastlm.GPT(size.config)
    wanted_loss, wanted_norm = _reference(size, device, start)
    trainers: dict[str, Trainer] = {}
    failed: dict[str, str] = {}
    norms: dict[str, float] = {}
    for peer in PEERS:
        if peer in skip:
            continue
        try:
            trainers[peer] = trainer = Trainer(peer, size, dtype, device, start)
            trainer.backward()
            norms[peer] = _gradient_norm(trainer.model)
        except Exception as error:
            trainers.pop(peer, None)
            failed[peer] = reason_of(error)
    measured = timing.interleave({peer: t.step for peer, t in trainers.items()}, rounds, budget)
    results = [measured.get(p, Result(p, reason=failed.get(p))) for p in PEERS if p not in skip]
    textbook = trainers[BASELINE].losses if BASELINE in trainers else []
    for result in results:
        if not result.seconds:
            continue
        losses = trainers[result.peer].losses
        steps = min(len(losses), len(textbook))  # a fast peer makes more steps a round
        pairs = [
            (losses[0], wanted_loss),
            (norms[result.peer], wanted_norm),
            *zip(losses[:steps], textbook[:steps], strict=True),
        ]
        result.error = max(abs(a - b) / abs(b) for a, b in pairs)
        result.extra["tokens_per_second"] = size.batch * size.length / (result.median or 1.0)
        result.extra["loss"] = losses[:steps]
    name = str(dtype).removeprefix("torch.")
    return Comparison("step", f"training {size}", "step", name, results)


def _reference(size: Size, device: str, start: fastlm.GPT) -> tuple[float, float]:
    """Loss and gradient norm of the first step on the reference backend in float32."""
    with fastlm.backend("reference"):
        trainer = Trainer("fastlm", size, torch.float32, device, start)
        loss = trainer.backward().item()
    return loss, _gradient_norm(trainer.model)


def _gradient_norm(model: nn.Module) -> float:
    return fastlm.optim.clip_grad_norm(model.parameters(), float("inf")).norm.item()


class Generator:
    """One peer's greedy generation from one prompt: a call gives the prompt and its continuation."""

    def __init__(
        self, peer: str, size: Size, dtype: torch.dtype, device: str, reference: fastlm.GPT | None = None
    ) -> None:
        self.peer, self.new = peer, min(NEW_TOKENS, size.config.block_size - PROMPT)
        self.model = model_of(peer, size, device, reference).to(dtype).eval()
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(size.config.vocab_size, (1, PROMPT), generator=generator).to(device)

    def __call__(self) -> Tensor:
        if self.peer == "fastlm":
            return self.model.generate(self.prompt, self.new, temperature=0.0)
        if self.peer == "transformers":
            return self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                do_sample=False,
                pad_token_id=0,
            )
        return self.model.generate(self.prompt, self.new)


def compare_generation(
    size: Size, dtype: torch.dtype, device: str, rounds: int, budget: float, skip: set[str]
) -> Comparison:
    """Time greedy generation, one sequence. `error` is the part of the tokens that are not those of our reference
    backend in float32: with random weights the likeliest tokens are close together, and low precision changes some."""
    torch.manual_seed(0)
    start = fastlm.GPT(size.config)
    generators: dict[str, Generator] = {}
    failed = {"torch.compile": "the textbook's cache grows with every token: each length would be compiled anew"}
    for peer in PEERS:
        if peer in skip or peer in failed:
            continue
        try:
            generators[peer] = Generator(peer, size, dtype, device, start)
        except Exception as error:
            failed[peer] = reason_of(error)
    measured = timing.interleave(dict(generators), rounds, budget)
    results = [measured.get(p, Result(p, reason=failed.get(p))) for p in PEERS if p not in skip]
    with fastlm.backend("reference"):
        wanted = Generator("fastlm", size, torch.float32, device, start)()
    for result in results:
        if result.seconds:
            generator = generators[result.peer]
            result.error = (generator() != wanted)[:, PROMPT:].double().mean().item()
            result.extra["tokens_per_second"] = generator.new / (result.median or 1.0)
    name = str(dtype).removeprefix("torch.")
    return Comparison(
        "generation", f"generation {size.name} {PROMPT}+{wanted.shape[1] - PROMPT}", "greedy", name, results
    )
