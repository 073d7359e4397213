"""Reading a prompt and decoding beside llama.cpp: GPT-2 124M, the same weights, the same precision, the same threads.

    pip install llama-cpp-python gguf
    python -m benchmarks.llama_cpp --out benchmarks/results/llama-cpp.json

The weights are random: how fast a token comes does not depend on them. Each round starts a process for each of the two,
in turn, since both keep threads that wait by spinning. Greedy tokens must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm.bench import report

PROMPT, NEW, REPEATS = list(range(100, 164)), 64, 5
LENGTHS = (32, 128, 256)  # of prompts that are read, with one token after them
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "norm": "output_norm",
    "norm_1": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.proj": "attn_output",
    "norm_2": "ffn_norm",
    "mlp.fc": "ffn_up",
    "mlp.proj": "ffn_down",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker[0]](options.worker[1], options.threads)))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in (torch.float32, torch.bfloat16):
            models = _save(folder, dtype)
            rounds = [
                {peer: _ask(peer, models[peer], options.threads) for peer in WORKERS} for _ in range(options.rounds)
            ]
            results += _summaries(str(dtype).removeprefix("torch."), rounds)
    if options.out is not None:
        content = {"environment": report.environment(), "threads": options.threads, "results": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _save(folder: Path, dtype: torch.dtype) -> dict[str, Path]:
    """The same model for both: a folder of Hugging Face's layout, and a GGUF file."""
    import gguf

    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.preset("gpt2", vocab_size=50304)).to(dtype)
    paths = {"fastlm": folder / f"{dtype}", "llama.cpp": folder / f"{dtype}.gguf"}
    model.save_pretrained(paths["fastlm"])
    config = model.config
    writer = gguf.GGUFWriter(paths["llama.cpp"], "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")  # tokens go in and out as numbers, but the file must have some
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["< 0"])
    for key, value in model.state_dict().items():
        half = dtype == torch.bfloat16 and value.ndim == 2 and key != "wpe.weight"
        array = value.detach().float().numpy()
        if half:
            bits = gguf.quants.quantize(array, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(_gguf_name(key), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(_gguf_name(key), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return paths


def _gguf_name(key: str) -> str:
    if key in NAMES:
        return NAMES[key]
    block = ""
    if key.startswith("blocks."):
        _, index, key = key.split(".", 2)
        block = f"blk.{index}."
    layer, _, kind = key.rpartition(".")
    return f"{block}{NAMES[layer]}.{kind}"


def _ask(peer: str, model: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.llama_cpp", "--threads", str(threads), "--worker", peer, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _fastlm(path: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if path.endswith("bfloat16") else torch.float32  # it is loaded as float32
    model = fastlm.GPT.from_pretrained(path).to(dtype).eval()

    def generate(prompt: list[int], new: int) -> list[int]:
        return model.generate(torch.tensor([prompt]), new, temperature=0.0)[0, len(prompt) :].tolist()

    return _timed(generate)


def _llama_cpp(path: str, threads: int) -> dict[str, Any]:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompt: list[int], new: int) -> list[int]:
        model.reset()
        tokens = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [token for token, _ in zip(tokens, range(new), strict=False)]

    return _timed(generate)


def _timed(generate: Callable[[list[int], int], list[int]]) -> dict[str, Any]:
    """`generate`: the tokens after a prompt, so many."""

    def rate(tokens: int, prompt: list[int], new: int) -> float:
        seconds = []
        for _ in range(REPEATS + 1):  # the first is not counted
            start = time.perf_counter()
            generate(prompt, new)
            seconds.append(time.perf_counter() - start)
        return tokens / statistics.median(seconds[1:])

    rates = {f"prompt of {length}": rate(length, list(range(length)), 1) for length in LENGTHS}
    return {"tokens": generate(PROMPT, NEW), "tokens_per_second": rates | {"decoding": rate(NEW, PROMPT, NEW)}}


WORKERS = {"fastlm": _fastlm, "llama.cpp": _llama_cpp}


def _summaries(dtype: str, rounds: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    same = all(round_["fastlm"]["tokens"] == round_["llama.cpp"]["tokens"] for round_ in rounds)
    print(f"{dtype}: {'the same tokens' if same else 'DIFFERENT TOKENS'}", flush=True)
    results = []
    for work in rounds[0]["fastlm"]["tokens_per_second"]:
        rates = {peer: [round_[peer]["tokens_per_second"][work] for round_ in rounds] for peer in WORKERS}
        ratios = [ours / theirs for ours, theirs in zip(rates["fastlm"], rates["llama.cpp"], strict=True)]
        ratio = statistics.median(ratios)
        medians = ", ".join(f"{peer} {statistics.median(values):.1f} tokens/s" for peer, values in rates.items())
        print(f"  {work}: {medians}; {ratio:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
        results.append({"dtype": dtype, "work": work, "tokens_per_second": rates, "ratio": ratio, "same_tokens": same})
    return results


if __name__ == "__main__":
    main()
