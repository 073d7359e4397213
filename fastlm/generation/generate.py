"""Generation with a cache, for one prompt or many of any lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.generation.cache import KVCache, Pool, PoolRows, PrefixCache, RaggedCache
from fastlm.generation.decoder import Decoder
from fastlm.generation.graph import GraphDecoder
from fastlm.generation.prompts import Prompts, checked_prompts
from fastlm.generation.sampling import Sampling
from fastlm.generation.stopping import Stop, eos_tokens, stop_rule
from fastlm.nn.modes import evaluating

if TYPE_CHECKING:
    from fastlm.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    idx: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token: int | Sequence[int] | None = None,
    stop: Stop | None = None,
    pad_token: int | None = None,
    generator: torch.Generator | None = None,
    overflow: str = "slide",
    stream: Callable[[int, int], object] | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Tensor | list[Tensor]:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Prompts of different lengths go through the model as one batch, without padding: with temperature=0 each row is what
    it would be alone. Dropout is off while generating.

    Args:
        idx: (B, T) token ids, or a list of B prompts, 1-D tensors or lists of ids, of any lengths from 1 to block_size.
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p, min_p: see `fastlm.ops.sample`.
        repetition_penalty: see `fastlm.generation.penalise_repetition`; on the tokens of the prompt and of the
            continuation.
        eos_token: a row that produces it is finished; of several, any.
        stop: a row is finished when its continuation ends with one of these token sequences, or when a function of the
            continuation (a list of ids) returns True: `stop=lambda ids: "\\n\\n" in tokenizer.decode(ids)`.
        pad_token: fills a row that finished before the others where the result is one tensor; default: the (first)
            eos_token.
        generator: the source of randomness, on the model's device. Same seed, same prompts, same tokens.
        overflow: what to do when a row is block_size long and still not finished. "slide": go on with the last half of
            the context as the new one, its positions counted from 0 (each token then sees between a half and all of
            block_size, at the cost of one prefill for each half). "error": refuse, before anything is generated, what
            could get that far.
        stream: called as stream(row, token) for every new token as soon as it is known.
        prefix_cache: for one prompt: what an earlier call with it has read or written is not read again.

    Returns:
        The prompts and their continuations, the eos or stop tokens included: for a tensor a tensor (B, T + new), for a
        list a list of B 1-D tensors.

    Raises:
        ValueError: an option or a prompt is out of its range.
        RuntimeError: the model's logits are NaN.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if overflow not in ("slide", "error"):
        raise ValueError(f"overflow must be 'slide' or 'error', got {overflow!r}")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = checked_prompts(idx, model.config.vocab_size, model.device, model.config.block_size)
    finished_by = stop_rule(stop, eos_token)
    pad_token = next(iter(eos_tokens(eos_token)), None) if pad_token is None else pad_token
    as_tensor = isinstance(idx, Tensor)
    if as_tensor and stop is not None and pad_token is None and len(prompts) > 1:
        raise ValueError("rows of one tensor may stop at different lengths: give pad_token, or the prompts as a list")
    if prefix_cache is not None and len(prompts) != 1:
        raise ValueError(f"a prefix_cache is for one prompt, got {len(prompts)}")
    longest = max((len(p) for p in prompts), default=0)
    if overflow == "error" and longest + max_new_tokens > model.config.block_size:
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones are more than this model's context, block_size = "
            f"{model.config.block_size}; ask for fewer, or pass overflow='slide'"
        )

    groups = _Group.by_length(model, prompts, max_new_tokens, with_seen=repetition_penalty is not None)
    results = list(prompts)
    known = groups[:1]  # whose cache is the prefix_cache's
    if prefix_cache is not None:
        known[0].cache = prefix_cache.lend(prompts[0].tolist(), model.config.n_layer)
    try:
        with evaluating(model):
            decode = _decoder(model)
            reports = stream is not None or finished_by is not None
            watch = _Watch()
            for _ in range(max_new_tokens):
                if not groups:
                    break
                logits = _next_logits(model, decode, groups)  # (rows still open, V)
                watch.see(logits)
                if reports or not logits.is_cuda:
                    watch.refuse_nan()
                seen = [group.seen for group in groups if group.seen is not None]
                tokens = sampling(logits, torch.cat(seen) if seen else None, generator)
                parts = tokens.split([len(group.rows) for group in groups]) if len(groups) > 1 else [tokens]
                for group, new in zip(groups, parts, strict=True):
                    group.append(new)
                    if reports:
                        group.report(new.tolist(), stream, finished_by, results)
                groups = [group for group in groups if group.rows]
            watch.refuse_nan()
    finally:
        if prefix_cache is not None:
            prefix_cache.give_back(known[0].cache, known[0].cached())
    for group in groups:
        group.finish(range(len(group.rows)), results)
    return _padded(results, pad_token) if as_tensor else results


class _Group:
    """Rows that have one length, and so always will: each grows by one token a step."""

    def __init__(
        self, model: GPT, rows: list[int], prompts: list[Tensor], max_new_tokens: int, with_seen: bool, pool: PoolRows
    ) -> None:
        self.rows = rows  # where these rows stand in the caller's batch
        self.length = len(prompts[0])
        self.start = 0  # the place of the cache's first token
        self.tokens = prompts[0].new_zeros(len(rows), self.length + max_new_tokens)
        self.tokens[:, : self.length] = torch.stack(prompts)
        self.block_size = model.config.block_size
        self.cache = KVCache(model.config.n_layer, min(self.length + max_new_tokens, self.block_size), pool)
        self.continuations: list[list[int]] = [[] for _ in rows]  # kept where something may stop a row
        self.seen: Tensor | None = None  # (rows, V): the tokens so far
        if with_seen:
            self.seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=self.tokens.device)
            self.seen.scatter_(1, self.tokens[:, : self.length], True)

    @classmethod
    def by_length(cls, model: GPT, prompts: list[Tensor], max_new_tokens: int, with_seen: bool) -> list[_Group]:
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        longest = max((len(prompt) for prompt in prompts), default=0)
        pool = Pool(len(prompts), min(longest + max_new_tokens, model.config.block_size))
        groups: list[_Group] = []
        for _, same in itertools.groupby(order, key=lambda row: len(prompts[row])):
            rows = list(same)
            place = PoolRows(pool, sum(len(group.rows) for group in groups), len(rows))
            groups.append(cls(model, rows, [prompts[row] for row in rows], max_new_tokens, with_seen, place))
        return groups

    def new_context(self) -> Tensor | None:
        """The tokens to read before the next one is decoded: the prompt, or what of it is not in the cache; where the
        cache is full, for an empty one, the last half. None: there is only the newest token."""
        if self.cache.length == self.block_size:
            self.cache.cut(0)
            self.start = self.length - max(self.block_size // 2, 1)
        at = self.start + self.cache.length
        return self.tokens[:, at : self.length] if self.cache.length == 0 or self.length - at > 1 else None

    def cached(self) -> list[int]:
        """The tokens of the first row that the cache holds."""
        return self.tokens[0, self.start : self.start + self.cache.length].tolist()

    def append(self, new: Tensor) -> None:
        """new: (rows), the next token of each."""
        self.tokens[:, self.length] = new
        self.length += 1
        if self.seen is not None:
            self.seen.scatter_(1, new[:, None], True)

    def report(
        self,
        new: list[int],
        stream: Callable[[int, int], object] | None,
        finished_by: Callable[[list[int]], bool] | None,
        results: list[Tensor],
    ) -> None:
        """Tell the caller of the new tokens, and let go of the rows that are finished."""
        if stream is not None:
            for row, token in zip(self.rows, new, strict=True):
                stream(row, token)
        if finished_by is None:
            return
        for continuation, token in zip(self.continuations, new, strict=True):
            continuation.append(token)
        finished = {i for i, continuation in enumerate(self.continuations) if finished_by(continuation)}
        if finished:
            self.finish(finished, results)
            self._keep([i for i in range(len(self.rows)) if i not in finished])

    def _keep(self, which: list[int]) -> None:
        self.rows = [self.rows[i] for i in which]
        if not which:  # the cache may be wanted yet
            return
        self.continuations = [self.continuations[i] for i in which]
        index = torch.tensor(which, dtype=torch.int64, device=self.tokens.device)
        self.tokens = self.tokens.index_select(0, index)
        self.cache.keep(index)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, index)

    def finish(self, which: Iterable[int], results: list[Tensor]) -> None:
        """Hand over these rows of the group."""
        for i in which:
            results[self.rows[i]] = self.tokens[i, : self.length].clone()


def _decoder(model: GPT) -> Callable[..., Tensor]:
    """From one token a row (B, 1) and their cache to logits (B, V), in the fastest way that this model allows."""
    if GraphDecoder.suits(model):
        return GraphDecoder(model)
    hidden_states = Decoder(model) if Decoder.suits(model) else model.hidden_states
    return lambda last, cache: model.logits(hidden_states(last, cache=cache)[:, -1])


class _Watch:
    """Whether the logits are finite; on a GPU looking waits for it, so some steps are looked at together."""

    _TOGETHER = 64

    def __init__(self) -> None:
        self._nan: list[Tensor] = []  # of the last steps
        self._steps = 0  # before them

    def see(self, logits: Tensor) -> None:
        """One more step's logits."""
        self._nan.append(torch.isnan(logits).any())
        if len(self._nan) == self._TOGETHER:
            self.refuse_nan()

    def refuse_nan(self) -> None:
        """RuntimeError where a step's logits were NaN."""
        for is_nan in torch.stack(self._nan).tolist() if self._nan else ():
            self._steps += 1
            if is_nan:
                raise RuntimeError(f"the model's logits are NaN at new token {self._steps}: are its weights finite?")
        self._nan.clear()


def _next_logits(model: GPT, decode: Callable[..., Tensor], groups: list[_Group]) -> Tensor:
    """The logits of the next token of every row, (rows, V), in the order of the groups. `decode`: see `_decoder`."""
    contexts = [(group, group.new_context()) for group in groups]
    reading = [(group, context) for group, context in contexts if context is not None]
    decoding = [group for group, context in contexts if context is None]
    logits: dict[int, Tensor] = {}  # by the group
    if reading:
        hidden = [model.hidden_states(context, cache=group.cache)[:, -1] for group, context in reading]  # (rows, C)
        together = model.logits(torch.cat(hidden))
        if not decoding:
            return together
        logits.update(zip((id(group) for group, _ in reading), together.split([len(h) for h in hidden]), strict=True))
    newest = [group.tokens[:, group.length - 1 : group.length] for group in decoding]  # (rows, 1)
    sizes = [len(group.rows) for group in decoding]
    cache = decoding[0].cache if len(decoding) == 1 else RaggedCache([group.cache for group in decoding], sizes)
    together = decode(newest[0] if len(newest) == 1 else torch.cat(newest), cache)
    if not reading:
        return together
    logits.update(zip(map(id, decoding), together.split(sizes), strict=True))
    return torch.cat([logits[id(group)] for group in groups])


def _padded(rows: list[Tensor], pad_token: int | None) -> Tensor:
    if not rows:
        return torch.empty(0, 0, dtype=torch.int64)
    if pad_token is None:
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token)
