"""What stands around the training step: `python -m fastlm.bench.io`.

loader       tokens/s of the data loader, from shards on the disk
prepare      MB/s of `fastlm prepare`, by bytes and by BPE, against the `tokenizers` library alone on the same text
checkpoint   what a save costs the training loop, against the copy of the same tensors alone
batching     greedy tokens/s of 16 prompts in a batch, against the same prompts one at a time
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastlm
from fastlm.bench import report
from fastlm.data import BPETokenizer, TokenData, WindowLoader
from fastlm.data.pipeline import PrepareOptions, prepare_files
from fastlm.data.prepare import BATCH_CHARS
from fastlm.training.checkpoint import CheckpointWriter, copied

SMALLEST = 1_000_000  # bytes of the text: a corpus of more copies of a smaller one would be like no text
PARTS = ("loader", "prepare", "checkpoint", "batching")


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_loader(text: Path, folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    """Tokens/s of the loader's batches, 32 windows of 1,024 tokens, in both orders."""
    corpus = folder / "corpus.txt"
    with corpus.open("wb") as f:
        for _ in range(max(1, int(100_000_000 * scale) // text.stat().st_size)):
            f.write(text.read_bytes())
    prepare_files([corpus], folder / "data", PrepareOptions(overwrite=True))
    data = TokenData.open(folder / "data", "train")
    result: dict[str, Any] = {"tokens": data.tokens}
    for order in ("random", "shuffled"):
        loader = WindowLoader(data, 32, 1024, order=order)
        loader.next_batch()

        def batches(loader: WindowLoader = loader) -> None:
            for _ in range(200):
                loader.next_batch()

        seconds = [timed(batches) for _ in range(rounds)]
        result[f"tokens_per_second_{order}"] = 200 * 32 * 1024 / statistics.median(seconds)
    return result


def measure_prepare(text: Path, folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    """MB/s of prepare; of BPE beside the library's own encode_batch_fast over the same pieces, in turns."""
    corpus = folder / "corpus.txt"
    with corpus.open("wb") as f:
        for _ in range(max(1, int(40_000_000 * scale) // text.stat().st_size)):
            f.write(text.read_bytes())
    size = corpus.stat().st_size / 1e6
    tokenizer = BPETokenizer.train([text.read_text(encoding="utf-8")[:4_000_000]], 8192)
    tokenizer.save(folder / "bpe")
    content = corpus.read_text(encoding="utf-8")
    pieces = [content[i : i + (1 << 20)] for i in range(0, len(content), 1 << 20)]
    batch = max(1, BATCH_CHARS >> 20)

    def library() -> None:
        for i in range(0, len(pieces), batch):
            encodings = tokenizer.backend.encode_batch_fast(pieces[i : i + batch], add_special_tokens=False)
            for encoding in encodings:
                np.asarray(encoding.ids, dtype=np.uint16)

    def prepare(name: str) -> Callable[[], Any]:
        options = PrepareOptions(name, val=0.0, overwrite=True)
        return lambda: prepare_files([corpus], folder / "data", options)

    calls = {"bytes": prepare("bytes"), "bpe": prepare(str(folder / "bpe")), "tokenizers library": library}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    result: dict[str, Any] = {f"megabytes_per_second_{n}": size / statistics.median(s) for n, s in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["tokenizers library"], seconds["bpe"], strict=True)]
    return {"megabytes": size, **result, "bpe_over_library": statistics.median(ratios)}


def measure_checkpoint(folder: Path, rounds: int, scale: float) -> dict[str, Any]:
    """Seconds that `CheckpointWriter.save` keeps the training loop, and seconds of copying the same tensors alone."""
    torch.manual_seed(0)
    model = fastlm.GPT(
        fastlm.GPTConfig.preset("gpt2", vocab_size=8192, n_layer=math.ceil(8 * scale), n_embd=512, n_head=8)
    )
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=1e-4)
    idx = torch.randint(8192, (1, 64))
    model(idx, idx)[1].backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict()}
    shadow, held = copy.deepcopy(model.state_dict()), copied(state)
    writer = CheckpointWriter(folder / "checkpoints", keep_last=1)
    writer.save(model, state, 0, None)  # the first one makes room for the copies
    writer.wait()

    def copy_alone() -> None:
        for name, value in model.state_dict().items():
            shadow[name].copy_(value)
        copied(state, held)

    saves, copies, whole = [], [], []
    for i in range(1, rounds + 1):
        copies.append(timed(copy_alone))
        begin = time.perf_counter()
        saves.append(timed(lambda step=i: writer.save(model, state, step, None)))  # type: ignore[misc]
        writer.wait()
        whole.append(time.perf_counter() - begin)
    megabytes = sum(p.numel() * 4 for p in model.parameters()) / 1e6
    return {
        "megabytes_of_weights": megabytes,
        "megabytes_copied": 3 * megabytes,  # and the two moments
        "seconds_copy_alone": statistics.median(copies),
        "seconds_training_waits": statistics.median(saves),
        "seconds_until_on_disk": statistics.median(whole),
        "waits_over_copy": statistics.median(s / c for s, c in zip(saves, copies, strict=True)),
    }


def measure_batching(rounds: int, scale: float) -> dict[str, Any]:
    """Greedy tokens/s of 16 prompts of 16 different lengths, in a batch and one at a time; the tokens are compared."""
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.preset("micro")).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(256, (20 + row,), generator=generator).tolist() for row in range(16)]
    new = math.ceil(64 * scale)

    def together() -> list[list[int]]:
        return [row.tolist() for row in model.generate(prompts, new, temperature=0.0)]

    def alone() -> list[list[int]]:
        return [model.generate([p], new, temperature=0.0)[0].tolist() for p in prompts]

    same = together() == alone()
    seconds: dict[str, list[float]] = {"batch": [], "alone": []}
    for _ in range(rounds):
        seconds["batch"].append(timed(together))
        seconds["alone"].append(timed(alone))
    return {
        "tokens_per_second_batch": 16 * new / statistics.median(seconds["batch"]),
        "tokens_per_second_alone": 16 * new / statistics.median(seconds["alone"]),
        "speedup": statistics.median(a / b for a, b in zip(seconds["alone"], seconds["batch"], strict=True)),
        "same_tokens": same,
    }


def run(text: Path, parts: tuple[str, ...] = PARTS, rounds: int = 5, scale: float = 1.0) -> dict[str, Any]:
    """The parts by name; `scale` makes the corpora, the model and the continuations smaller, for a test."""
    results: dict[str, Any] = {}
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if part == "loader":
                results[part] = measure_loader(text, folder, rounds, scale)
            elif part == "prepare":
                results[part] = measure_prepare(text, folder, rounds, scale)
            elif part == "checkpoint":
                results[part] = measure_checkpoint(folder, rounds, scale)
            else:
                results[part] = measure_batching(rounds, scale)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file of a few megabytes, repeated to make a corpus")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    parts = tuple(options.parts.split(","))
    for part in parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; the parts are: {', '.join(PARTS)}")
    if not options.text.is_file():
        parser.error(f"no such file: {options.text}")
    if (size := options.text.stat().st_size) < SMALLEST:
        parser.error(f"{options.text} has {size:,} bytes, wanted a text of at least {SMALLEST:,}")
    where = report.environment()
    results = run(options.text, parts, options.rounds)
    for part, values in results.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:28} {value:,.4g}" if isinstance(value, float) else f"  {name:28} {value}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": where, "results": results}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
