"""`fastlm prepare`: text to token shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="Text files, folders, or .jsonl files (also .gz).", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to make.", show_default=False)],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bytes, chars, bpe (trained on the text, see --vocab-size), or a path: a tokenizer.json, or a folder "
            "with one or with GPT-2's vocab.json and merges.txt; tiktoken:NAME, or a file NAME.tiktoken."
        ),
    ] = "bytes",
    vocab_size: Annotated[int, typer.Option(help="Ids of a BPE trained here.")] = 8192,
    val: Annotated[float, typer.Option(help="Part of the text for validation.")] = 0.1,
    val_input: Annotated[
        list[Path] | None, typer.Option(help="Validation text of its own (then --val is not used).")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Which files of a folder, as *.py.")] = "*",
    text_key: Annotated[str, typer.Option(help="The key of the text in a .jsonl line.")] = "text",
    on_bad_text: Annotated[
        str, typer.Option(help="Bytes that are not UTF-8: error, skip (the document) or replace.")
    ] = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is there already.")] = False,
    threads: Annotated[int, typer.Option(help="Threads for BPE; 0: all cores.", min=0)] = 0,
) -> None:
    """Turn text into a dataset folder of memory-mapped token shards.

    Few documents are each split at their end (the last 10 % are for validation); of a hundred or more, whole documents
    are held out. Memory does not grow with the corpus.
    """
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the tokenizers library at its first use
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from fastlm.data.documents import ReadReport, find_files
    from fastlm.data.pipeline import PrepareOptions, prepare_files

    console = Console()
    options = PrepareOptions(tokenizer, vocab_size, val, text_key, on_bad_text, overwrite)
    files = find_files(inputs, pattern)
    val_files = find_files(val_input, pattern) if val_input else []
    total = sum(p.stat().st_size for p in files + val_files)
    columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    report = ReadReport()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        manifest = prepare_files(
            files, out, options, val_files=val_files, report=report, progress=lambda n: bar.advance(task, n)
        )
    for split, counts in manifest["splits"].items():
        console.print(
            f"{split:5}  {counts['tokens']:>13,} tokens  {counts['documents']:>9,} documents  "
            f"{counts['text_bytes']:>13,} bytes",
            highlight=False,
        )
    for line in report.lines():
        console.print(f"left out: {line}", highlight=False, soft_wrap=True)
    console.print(
        f"dataset: {out}  (vocabulary {manifest['vocab_size']:,})", highlight=False, markup=False, soft_wrap=True
    )
    if tokenizer == "bpe" and manifest["vocab_size"] < vocab_size:
        console.print(
            f"note: fewer ids than --vocab-size {vocab_size}: the text has no more pairs to merge that occur twice",
            highlight=False,
            soft_wrap=True,
        )
