"""Translation: a causal model with the source as its prompt, or an encoder-decoder; the loss is on the target alone.

A causal model reads [end of text] source [tab] target [end of text]. An encoder-decoder reads the source, and writes
the target between two ends of text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm.data import BPETokenizer, Tokenizer
from fastlm.data.batches import Batch
from fastlm.data.examples import ExampleLoader, pack
from fastlm.data.loader import evenly_spaced, permute, scramble
from fastlm.data.tables import read_table
from fastlm.evaluation.translation import check_installed, score_translations
from fastlm.generation.beam import Hypothesis, beam_search, check_options, search
from fastlm.generation.seq2seq import Translations
from fastlm.models.config import GPTConfig
from fastlm.models.gpt import GPT
from fastlm.models.huggingface import from_pretrained
from fastlm.models.huggingface.load import read_config
from fastlm.models.seq2seq import MODEL_TYPE, EncoderDecoder
from fastlm.nn.modes import evaluating
from fastlm.ops.linear_cross_entropy import IGNORED
from fastlm.tasks.epochs import set_steps
from fastlm.tasks.pretrained import NEW, check_adapters, open_pretrained, trained_model
from fastlm.training.config import RunConfig
from fastlm.training.distributed import Processes
from fastlm.training.run import Loaders, choose_checkpoint

SEPARATOR = "\t"
ARCHITECTURES = ("decoder", "encoder-decoder")


@dataclass
class TranslationSettings:
    """The [task] section of `--task translation`."""

    train: str = ""  # a .tsv, .csv or .jsonl file with pairs
    val: str = ""  # the same, to choose the checkpoint by
    test: str = ""  # the same, for the metrics at the end; default: val
    source_column: str = "0"
    target_column: str = "1"
    architecture: str = "decoder"  # or "encoder-decoder", from new weights only
    vocab_size: int = 4096  # of the BPE trained on the pairs, where the model is new
    epochs: float = 0.0  # passes over the training pairs; 0: training.steps counts
    beams: int = 4
    length_penalty: float = 1.0
    max_new_tokens: int = 64
    dropout: float = -1.0  # of the model while it learns; -1: its own


Pair = tuple[str, str]  # source, target


class Task:
    """See `fastlm.tasks.registry`. The model `new` begins from scratch, with the shape in the config's [model] and a
    vocabulary trained on the pairs."""

    Settings = TranslationSettings

    def __init__(self, model: Path, settings: TranslationSettings, config: RunConfig):
        if settings.architecture not in ARCHITECTURES:
            raise ValueError(
                f"task.architecture must be one of {', '.join(ARCHITECTURES)}, got {settings.architecture!r}"
            )
        if not settings.train:
            raise ValueError("task.train is missing: a .tsv, .csv or .jsonl file with pairs of sentences")
        self._is_new = str(model) == NEW
        if settings.architecture == "encoder-decoder" and not self._is_new:
            raise ValueError(
                f"an encoder-decoder begins with new weights: give {NEW!r} as the model, got {str(model)!r}"
            )
        self._folder, self._settings, self._config = model, settings, config
        self._train = read_pairs(settings.train, settings)
        self._val = read_pairs(settings.val, settings) if settings.val else []
        self._test = read_pairs(settings.test, settings) if settings.test else self._val
        if self._test:  # they are scored at the end: not after hours of training the word that it cannot be done
            check_installed()
        self.tokenizer: Tokenizer
        if self._is_new:
            lines = (text for pair in self._train for text in pair)
            self.tokenizer = BPETokenizer.train(itertools.chain(lines, [SEPARATOR]), settings.vocab_size)
        else:
            self.tokenizer = open_pretrained(model)[1]
        check_options(settings.beams, settings.max_new_tokens, self.tokenizer.vocab_size)
        if self.tokenizer.eot is None:
            raise ValueError(f"{self.tokenizer!r} has no end-of-text token, which ends a translation")

    def make_model(self) -> GPT | EncoderDecoder:
        """The pretrained model, or a new one."""
        if not self._is_new:
            model = trained_model(self._folder, self._config.lora, self._settings.dropout)
            if not isinstance(model, GPT):
                raise ValueError(f"{self._folder} is a masked model, and translation needs a causal one")
            return model
        config = self._new_config()
        self._config.model = config.to_dict()
        return GPT(config) if self._settings.architecture == "decoder" else EncoderDecoder(config)

    def open_model(self, path: Path) -> GPT | EncoderDecoder:
        """Of a checkpoint; ValueError where the settings are of another model."""
        model = open_translator(path)
        wanted: type = EncoderDecoder if self._settings.architecture == "encoder-decoder" else GPT
        if not isinstance(model, wanted) or (self._is_new and model.config != self._new_config()):
            raise ValueError(f"the checkpoint {path} is of another model than the one in the run's settings")
        if isinstance(model, GPT):
            check_adapters(model, self._config.lora, path)
        return model

    def _new_config(self) -> GPTConfig:
        fields = {**self._config.model, "vocab_size": self.tokenizer.vocab_size}
        preset = fields.pop("preset", None)
        return GPTConfig.preset(preset, **fields) if preset else GPTConfig.from_dict(fields)

    def loaders(self, model: GPT | EncoderDecoder, group: Processes) -> Loaders:
        """The pairs; sets training.steps from the epochs."""
        t = self._config.training

        def loader(pairs: Sequence[Pair], **part: int) -> PairLoader:
            encoded = encode_pairs(pairs, self.tokenizer, model.config.block_size)
            kind = PairLoader if isinstance(model, GPT) else SourceLoader
            return kind(encoded, self.tokenizer, t.batch_size, **part)

        train = loader(self._train, seed=t.seed, rank=group.rank, world_size=group.world_size)
        set_steps(self._config, self._settings.epochs, train)
        return train, loader(self._val) if self._val else None

    def finish(self, run: Path) -> dict[str, Any]:
        """BLEU and chrF of the best checkpoint, beside those of copying and of the most frequent sentence."""
        if not self._test:
            return {}
        model = open_translator(choose_checkpoint(run).model_path)
        sources, references = [s for s, _ in self._test], [t for _, t in self._test]
        s = self._settings
        translated = translate(model, self.tokenizer, sources, s.beams, s.length_penalty, s.max_new_tokens)
        frequent = Counter(target for _, target in self._train).most_common(1)[0][0]
        rows = zip(sources, references, translated, strict=True)
        (run / "translations.tsv").write_text("".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows), encoding="utf-8")
        scores: dict[str, Any] = {"pairs": len(sources)}
        for name, lines in (("", translated), ("copy_", sources), ("frequent_", [frequent] * len(sources))):
            bleu, chrf = score_translations(lines, references)
            scores |= {f"{name}bleu": bleu, f"{name}chrf": chrf}
        exact = sum(a == b for a, b in zip(translated, references, strict=True))
        return {
            **scores,
            "exact": exact / len(sources),
            "examples": [list(r) for r in zip(sources[:5], translated[:5], strict=True)],
        }

    def draw(self, run: Path, metrics: dict[str, Any]) -> None:
        """Nothing beside the losses."""


def read_pairs(path: str, settings: TranslationSettings) -> list[Pair]:
    """Sources and targets; ValueError for missing columns or an empty side, with the line."""
    columns = (settings.source_column, settings.target_column)
    if Path(path).suffix == ".tsv" and all(c.isdecimal() for c in columns):
        rows = _read_plain(Path(path), int(columns[0]), int(columns[1]))
    else:
        rows = [(str(a), str(b)) for a, b in read_table(path, columns)]
    for number, pair in enumerate(rows, 1):
        if not all(text.strip() for text in pair):
            raise ValueError(f"{path}: pair {number} has an empty side: {pair!r}")
    if not rows:
        raise ValueError(f"{path} has no pairs")
    return rows


def _read_plain(path: Path, source: int, target: int) -> list[Pair]:
    """A .tsv without a header, its columns by number."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) <= max(source, target):
            raise ValueError(
                f"{path}:{number} has {len(fields)} column{'s' * (len(fields) != 1)} separated by tabs, wanted "
                f"{max(source, target) + 1}: {line[:60]!r}"
            )
        pairs.append((fields[source], fields[target]))
    return pairs


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, block_size: int) -> list[tuple[list[int], list[int]]]:
    """Ids of source and target; a source that leaves no room is cut on the right, a target to what has room."""
    separator = len(tokenizer.encode(SEPARATOR))
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    targets = tokenizer.encode_batch([target for _, target in pairs])
    encoded = []
    for source, target in zip(sources, targets, strict=True):
        kept = source[: longest_source(block_size)].tolist()
        encoded.append((kept, target[: block_size - len(kept) - separator - 1].tolist()))
    return encoded


def longest_source(block_size: int) -> int:
    """Tokens of the longest source, so that there is room for a target as long."""
    return max(1, block_size // 2)


def prompt_of(source: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """What a causal model reads before the target."""
    assert tokenizer.eot is not None
    return [tokenizer.eot, *source, *tokenizer.encode(SEPARATOR)]


class PairLoader(ExampleLoader):
    """Batches (x, y, cu_seqlens, max_seqlen) for a causal model: packed, y is -100 where the source is predicted."""

    def __init__(
        self, pairs: Sequence[tuple[list[int], list[int]]], tokenizer: Tokenizer, batch_size: int, **part: int
    ):
        prompts = [prompt_of(source, tokenizer) for source, _ in pairs]
        wholes = [[*p, *target, tokenizer.eot] for p, (_, target) in zip(prompts, pairs, strict=True)]
        super().__init__(wholes, [0] * len(pairs), batch_size, **part)  # type: ignore[arg-type]
        self.prompts = [len(p) for p in prompts]
        self.block_size -= 1

    def weight(self, batch: Batch) -> float:
        """The number of the targets' tokens."""
        y = batch["y"] if isinstance(batch, dict) else batch[1]
        return int((y != IGNORED).sum())

    def _batch(self, rows: list[int]) -> Batch:
        x, cu_seqlens, longest = pack([self.sequences[row][:-1] for row in rows])
        targets = []
        for row in rows:
            y = self.sequences[row][1:].clone()
            y[: self.prompts[row] - 1] = IGNORED
            targets.append(y)
        return x, torch.cat(targets)[None], cu_seqlens, longest


class SourceLoader(PairLoader):
    """Batches for an encoder-decoder: sources of one length, so that none is padded; targets padded at the end.

    An epoch has the pairs of each length in a new order, cut into batches of up to `batch_size`, and the batches in a
    new order. `samples` counts batches here: how many there are of an epoch follows from `batch_size`.
    """

    def __init__(
        self, pairs: Sequence[tuple[list[int], list[int]]], tokenizer: Tokenizer, batch_size: int, **part: int
    ):
        super().__init__(pairs, tokenizer, batch_size, **part)
        self.pairs, self.eot = pairs, tokenizer.eot
        lengths = Counter(len(source) for source, _ in pairs)
        self.samples_per_epoch = sum(-(-count // batch_size) for count in lengths.values())
        self.samples_per_batch = 1
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def next_batch(self) -> Batch:
        number = self.samples + self.rank
        self.samples += self.world_size
        epoch, place = divmod(number, self.samples_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._batch(self._epoch[1][place])

    def evaluation_batches(self, count: int) -> Iterator[tuple[Batch, float]]:
        """`count` pairs at even distances, by length, in batches with their weights."""
        for rows in self._cut(evenly_spaced(len(self.pairs), count).tolist()):
            batch = self._batch(rows)
            yield batch, self.weight(batch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "batches": self.samples_per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        batches = state.get("batches", self.samples_per_epoch)  # an older state does not say
        if batches != self.samples_per_epoch:
            raise ValueError(
                f"the saved data position is in epochs of {batches} batches, this loader's have "
                f"{self.samples_per_epoch}: training.batch_size (now {self.batch_size}) must stay as it was"
            )
        super().load_state_dict({**state, "batches": batches})

    def _shuffled(self, epoch: int) -> list[list[int]]:
        key = scramble(scramble(self.seed) ^ epoch)
        order = permute(np.arange(len(self.pairs), dtype=np.uint64), len(self.pairs), key)
        batches = self._cut(order.tolist())
        return [batches[i] for i in permute(np.arange(len(batches), dtype=np.uint64), len(batches), key)]

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        by_length = sorted(order, key=lambda row: len(self.pairs[row][0]))
        groups = itertools.groupby(by_length, key=lambda row: len(self.pairs[row][0]))
        whole = [list(rows) for _, rows in groups]
        return [rows[i : i + self.batch_size] for rows in whole for i in range(0, len(rows), self.batch_size)]

    def _batch(self, rows: list[int]) -> Batch:
        source = torch.tensor([self.pairs[row][0] for row in rows])
        targets = [torch.tensor([self.eot, *self.pairs[row][1], self.eot]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        x = pad([t[:-1] for t in targets], batch_first=True, padding_value=self.eot or 0)
        y = pad([t[1:] for t in targets], batch_first=True, padding_value=IGNORED)
        return {"x": x, "y": y, "source": source}


def open_translator(path: Path) -> GPT | EncoderDecoder:
    """The model in a folder that a translation run wrote."""
    if read_config(path).get("model_type") == MODEL_TYPE:
        return EncoderDecoder.from_pretrained(path)
    return from_pretrained(path)


@torch.no_grad()
def translate(
    model: GPT | EncoderDecoder,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    beams: int = 4,
    length_penalty: float = 1.0,
    max_new_tokens: int = 64,
) -> list[str]:
    """The translation of each sentence, by beam search."""
    assert tokenizer.eot is not None
    eot, limit = tokenizer.eot, longest_source(model.config.block_size)
    ids = [tokenizer.encode(source)[:limit] for source in sources]
    if isinstance(model, GPT):
        prompts = [prompt_of(row, tokenizer) for row in ids]
        found = beam_search(model, prompts, max_new_tokens, eos_token=eot, beams=beams, length_penalty=length_penalty)
        return [tokenizer.decode(h.tokens).strip() for h in found]
    check_options(beams, max_new_tokens, model.config.vocab_size)
    results: list[Hypothesis | None] = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    with evaluating(model):
        for _, same in itertools.groupby(order, key=lambda row: len(ids[row])):
            rows = list(same)
            continuations = Translations(model, torch.tensor([ids[row] for row in rows], device=model.device), eot)
            steps = min(max_new_tokens, model.config.block_size)
            found = search(continuations, len(rows), steps, eot, beams, length_penalty)
            for row, h in zip(rows, found, strict=True):
                results[row] = h
    return [tokenizer.decode(h.tokens).strip() for h in results if h is not None]
