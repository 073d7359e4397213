"""Generation: the cache, ragged batches, stopping, and what is refused."""

from __future__ import annotations

import pytest
import torch

import fastlm
from fastlm.generation import KVCache, PrefixCache, RaggedCache
from fastlm.generation.cache import Pool, PoolRows

TINY = {
    "vocab_size": 53,
    "block_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "init_std": 0.3,
    "tie_embeddings": False,
}
LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2}
VARIANTS = {
    "gpt2": {},
    "llama": LLAMA,
    "window": {**LLAMA, "sliding_window": 4},
    "sinusoidal": {"position": "sinusoidal"},
    "alibi": {"position": "alibi"},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def tiny(**changes) -> fastlm.GPT:
    torch.manual_seed(0)
    return fastlm.GPT(fastlm.GPTConfig.from_dict({**TINY, **changes})).eval()


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 53, (n,), generator=generator) for n in lengths]


def greedy_without_cache(model: fastlm.GPT, prompt: torch.Tensor, new: int) -> torch.Tensor:
    idx = prompt[None]
    for _ in range(new):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx[0]


@variants
@torch.no_grad()
def test_cached_logits_equal_uncached_at_every_step(changes):
    model, idx = tiny(**changes), torch.stack(prompts(32, 32))
    full = model(idx)[0]
    cache = KVCache(n_layer=2, capacity=1)  # it has to grow
    steps = [idx[:, :5], idx[:, 5:6], idx[:, 6:9], *idx[:, 9:].split(1, dim=1)]
    logits = torch.cat([model(part, cache=cache)[0] for part in steps], dim=1)
    assert cache.length == 32
    torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_ragged_cache_equals_each_row_alone():
    model, rows = tiny(**LLAMA), prompts(3, 3, 9, 20)
    caches = [KVCache(2), KVCache(2), KVCache(2)]
    for cache, part in zip(caches, (torch.stack(rows[:2]), rows[2][None], rows[3][None]), strict=True):
        model(part, cache=cache)
    new = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    ragged = RaggedCache(caches, [2, 1, 1])
    assert ragged.length == 20
    logits = model(new, cache=ragged)[0]
    assert [cache.length for cache in caches] == [5, 11, 22]
    for row, tail, got in zip(rows, new, logits, strict=True):
        torch.testing.assert_close(got, model(torch.cat([row, tail])[None])[0][0, -2:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_one_attention_over_a_pool_has_the_bits_of_one_for_each_length():
    """Until a cache leaves the pool, and after."""
    model, rows = tiny(**LLAMA), prompts(3, 3, 9, 20)
    results = []
    for pool in (None, Pool(4, 23)):
        places = [None] * 3 if pool is None else [PoolRows(pool, 0, 2), PoolRows(pool, 2, 1), PoolRows(pool, 3, 1)]
        caches = [KVCache(2, pool=place) for place in places]
        for cache, part in zip(caches, (torch.stack(rows[:2]), rows[2][None], rows[3][None]), strict=True):
            model(part, cache=cache)
        ragged, logits = RaggedCache(caches, [2, 1, 1]), []
        for step in range(6):  # the longest grows out of the pool at the fourth
            assert (ragged._neighbours() is not None) == (pool is not None and step < 4)
            logits.append(model(torch.full((4, 1), step), cache=ragged)[0])
        results.append(torch.cat(logits, dim=1))
    assert torch.equal(*results)


@variants
@torch.no_grad()
def test_greedy_is_the_uncached_argmax(changes):
    model, prompt = tiny(**changes), prompts(4)[0]
    expected = greedy_without_cache(model, prompt, 28)
    assert torch.equal(model.generate(prompt[None], 28, temperature=0)[0], expected)


@variants
def test_ragged_batch_is_each_prompt_alone(changes):
    """Also past block_size, where rows begin a new context at different steps."""
    model, batch = tiny(**changes), prompts(5, 1, 11, 5, 32, 2, 31)
    together = model.generate(batch, 40, temperature=0)
    assert [len(row) for row in together] == [45, 41, 51, 45, 72, 42, 71]
    for prompt, row in zip(batch, together, strict=True):
        assert torch.equal(row[: len(prompt)], prompt)
        assert torch.equal(row, model.generate(prompt[None], 40, temperature=0)[0])


def test_ragged_batch_with_rows_that_finish():
    model, batch = tiny(), prompts(5, 3, 5, 9, 5)
    alone = [model.generate(prompt[None], 25, temperature=0)[0] for prompt in batch]
    eos = int(alone[2][8])  # what row 2 produces as its fourth token
    together = model.generate(batch, 25, temperature=0, eos_token=eos)
    assert len(together[2]) == 9
    for prompt, row, unstopped in zip(batch, together, alone, strict=True):
        assert torch.equal(row, unstopped[: len(row)])
        assert len(row) == len(unstopped) or row[-1] == eos
        assert eos not in row[len(prompt) : -1]


@torch.no_grad()
def test_sliding_goes_on_with_half_of_the_context():
    model, prompt = tiny(), prompts(30)[0]
    row = model.generate(prompt[None], 20, temperature=0)[0]
    assert torch.equal(row[:33], greedy_without_cache(model, prompt, 3))
    for length in range(33, 49):  # 32 is full: tokens 33 to 48 see the context that begins at 16 or 17
        start = 33 - 16
        assert row[length] == model(row[None, start:length])[0][0, -1].argmax()


def test_lists_of_ids_and_tensors():
    model = tiny()
    as_lists = model.generate([[1, 2, 3], [4]], 5, temperature=0)
    as_tensors = model.generate([torch.tensor([1, 2, 3]), torch.tensor([4], dtype=torch.int32)], 5, temperature=0)
    assert all(torch.equal(a, b) for a, b in zip(as_lists, as_tensors, strict=True))
    one = model.generate(torch.tensor([[1, 2, 3]]), 5, temperature=0)
    assert one.shape == (1, 8) and torch.equal(one[0], as_lists[0])
    assert torch.equal(model.generate(torch.tensor([[1, 2]]), 0), torch.tensor([[1, 2]]))
    assert model.generate([], 5) == []


def test_seeds_repeat():
    model, batch = tiny(), prompts(5, 3)
    runs = [
        model.generate(batch, 20, temperature=1.5, top_p=0.95, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_top_k_of_one_is_greedy_and_the_penalty_is_not():
    model, batch = tiny(), prompts(5, 3)
    greedy = model.generate(batch, 20, temperature=0)
    assert all(torch.equal(a, b) for a, b in zip(greedy, model.generate(batch, 20, top_k=1), strict=True))
    penalised = model.generate(batch, 20, temperature=0, repetition_penalty=1e6)
    for row in penalised:  # every logit of a token seen before is pushed below the others
        assert len(set(row.tolist())) == len(row)


def test_stop_sequences_and_functions():
    model, prompt = tiny(), prompts(5)[0]
    free = model.generate([prompt], 20, temperature=0)[0]
    ending = free[9:11].tolist()
    stopped = model.generate([prompt], 20, temperature=0, stop=[ending])[0]
    assert stopped[-2:].tolist() == ending and torch.equal(stopped, free[: len(stopped)]) and len(stopped) <= 11
    by_token = model.generate([prompt], 20, temperature=0, stop=[ending[0]])[0]
    assert by_token[-1] == ending[0] and len(by_token) < len(stopped)
    by_rule = model.generate([prompt], 20, temperature=0, stop=lambda new: len(new) == 4)[0]
    assert torch.equal(by_rule, free[:9])


def test_rows_of_a_tensor_are_padded():
    model, idx = tiny(), torch.stack(prompts(5, 5))
    free = model.generate(idx, 10, temperature=0)
    eos = int(free[0, 6])
    assert eos != free[0, 5]
    padded = model.generate(idx, 10, temperature=0, eos_token=eos, pad_token=52)
    assert torch.equal(padded[0, :7], free[0, :7]) and bool((padded[0, 7:] == 52).all())
    assert torch.equal(model.generate(idx, 10, temperature=0, eos_token=eos)[0, 6:].unique(), torch.tensor([eos]))
    other = int(free[1, 8])
    both = model.generate(idx, 10, temperature=0, eos_token=[other, eos])
    for row in range(2):
        end = next((i for i in range(5, 15) if free[row, i] in (other, eos)), 14)
        assert torch.equal(both[row, : end + 1], free[row, : end + 1]) and bool((both[row, end + 1 :] == other).all())
    with pytest.raises(ValueError, match="give pad_token, or the prompts as a list"):
        model.generate(idx, 10, stop=[[1]])


@variants
def test_a_prefix_cache_spares_what_was_read(changes, monkeypatch):
    model, kept, read = tiny(**changes), PrefixCache(), []
    transform = fastlm.GPT.hidden_states

    def counted(self, idx, **options):
        read.append(idx.shape[1])
        return transform(self, idx, **options)

    monkeypatch.setattr(fastlm.GPT, "hidden_states", counted)
    text = prompts(5)[0].tolist()
    for turn, new in enumerate(([], [7, 3, 9], [4], [8, 8])):
        prompt = text + new
        expected = model.generate([prompt], 4, temperature=0)[0].tolist()
        read.clear()
        stop = [expected[-2]] if turn == 1 else None  # a row that is finished leaves its cache, too
        text = model.generate([prompt], 4, temperature=0, stop=stop, prefix_cache=kept)[0].tolist()
        assert text == expected[: len(text)]
        # what is new and the last token before it, which was never read; tokens that C++ decodes do not show here
        assert read[0] == (len(prompt) if turn == 0 else len(new) + 1)
    other = [1, *text[1:6]]  # nothing of it is known
    read.clear()
    got = model.generate([other], 4, temperature=0, prefix_cache=kept)[0]
    assert read[0] == 6 and torch.equal(got, model.generate([other], 4, temperature=0)[0])
    with pytest.raises(ValueError, match="a prefix_cache is for one prompt, got 2"):
        model.generate(prompts(3, 3), 1, prefix_cache=kept)


def test_a_prefix_cache_outlives_what_goes_wrong_and_contexts_that_slide():
    model, kept = tiny(), PrefixCache()
    block_size = model.config.block_size
    prompt = prompts(5)[0].tolist()

    def interrupt(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([prompt], 4, temperature=0, stream=interrupt, prefix_cache=kept)
    for count in (4, block_size + 3, 2, block_size):
        got = model.generate([prompt], count, temperature=0, prefix_cache=kept)[0]
        assert torch.equal(got, model.generate([prompt], count, temperature=0)[0])


def test_streaming_tells_every_token_once():
    model, batch = tiny(), prompts(5, 3, 5)
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}
    rows = model.generate(batch, 12, temperature=0, stream=lambda row, token: told[row].append(token))
    for row, prompt in enumerate(batch):
        assert told[row] == rows[row][len(prompt) :].tolist()


def test_the_training_mode_is_restored():
    model = tiny(dropout=0.5).train()
    first, second = (model.generate(torch.tensor([[1, 2]]), 20, temperature=0) for _ in range(2))
    assert torch.equal(first, second) and model.training and model.blocks[0].attention.training
    assert not model.eval().generate([[1]], 1)[0].requires_grad and not model.training


def test_generated_ids_can_be_trained_on():
    model = tiny()
    idx = model.generate(torch.tensor([[1, 2]]), 10)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    assert model.wte.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
def test_generates_in_bfloat16(changes):
    model, prompt = tiny(**changes).bfloat16(), prompts(4)[0]
    assert torch.equal(model.generate(prompt[None], 20, temperature=0)[0], greedy_without_cache(model, prompt, 20))


@pytest.mark.parametrize(
    ("idx", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 33], {}, "prompt 0 has 33 tokens, more than this model's context, block_size = 32"),
        ([[1] * 30], {"overflow": "error"}, "30 prompt tokens and 5 new ones are more"),
        (torch.zeros(3, dtype=torch.int64), {}, r"shape \(B, T\), got \(3,\)"),
        ([torch.zeros(1, 3, dtype=torch.int64)], {}, "must be a 1-D tensor"),
        ([[0.5]], {}, "integer token ids, got torch.float32"),
        ([[53]], {}, "token id 53; this model knows 0 to 52"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0"),
        ([[1]], {"top_k": 0}, "top_k must be an integer of at least 1"),
        ([[1]], {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ([[1]], {"min_p": 2.0}, r"min_p must be in \[0, 1\]"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-6 to 1e6"),
        ([[1]], {"overflow": "crop"}, "overflow must be 'slide' or 'error', got 'crop'"),
        ([[1]], {"stop": "text"}, "stop must hold token ids"),
        ([[1]], {"stop": [[]]}, "empty token sequence"),
    ],
)
def test_bad_input(idx, options, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(idx, 5, **options)


def test_other_bad_input():
    model = tiny()
    with pytest.raises(ValueError, match="max_new_tokens must not be negative"):
        model.generate([[1]], -1)
    cache = KVCache(2)
    model(torch.zeros(1, 30, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="33 tokens is longer than block_size = 32"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="logits are NaN at new token 1"):
        model.generate([[1]], 5, temperature=0)
