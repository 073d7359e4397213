"""LSTMLM and its kernel: against torch.nn.LSTM, the state carried, generation, folders, threads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlm
from fastlm import ops
from fastlm.models.lstm import LSTMConfig
from fastlm.ops import native

VOCAB = 23


def small(**options: object) -> fastlm.LSTMLM:
    torch.manual_seed(0)
    return fastlm.LSTMLM(VOCAB, 12, 20, 2, **options).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_it_is_torchs_lstm() -> None:
    """Logits, hidden state and all gradients, with nn.LSTM's weights (one bias instead of its two)."""
    model = small()
    theirs = nn.LSTM(12, 20, 2, batch_first=True)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            getattr(theirs, f"weight_ih_l{i}").copy_(layer.weight_ih)
            getattr(theirs, f"weight_hh_l{i}").copy_(layer.weight_hh)
            getattr(theirs, f"bias_ih_l{i}").copy_(layer.bias)
            getattr(theirs, f"bias_hh_l{i}").zero_()
    x, y = tokens(3, 9), tokens(3, 9).flip(0)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(2, 3, 20, generator=generator), torch.randn(2, 3, 20, generator=generator)
    logits, hidden = model(x, start)
    states, expected = theirs(model.wte(x), start)
    torch.testing.assert_close(logits, nn.functional.linear(states, model.head_weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)

    loss, _ = model(x, start, targets=y)
    loss.backward()
    textbook = nn.functional.cross_entropy(nn.functional.linear(states, model.head_weight).flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(textbook.item(), rel=1e-5)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if n.startswith("layers")}
    textbook.backward()
    for i in range(2):
        for name in ("weight_ih", "weight_hh"):
            torch.testing.assert_close(
                got[f"layers.{i}.{name}"], getattr(theirs, f"{name}_l{i}").grad, rtol=1e-4, atol=1e-6
            )
        torch.testing.assert_close(
            got[f"layers.{i}.bias"], theirs.get_parameter(f"bias_ih_l{i}").grad, rtol=1e-4, atol=1e-6
        )


def test_the_state_carries_over() -> None:
    model, x = small(), tokens(2, 10)
    whole, end = model(x)
    first, hidden = model(x[:, :4])
    second, again = model(x[:, 4:], hidden)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, end, rtol=1e-5, atol=1e-6)


def test_the_loss_and_its_reductions() -> None:
    model, x, y = small(), tokens(2, 6), tokens(2, 6).clone()
    y[0, :3] = -100
    logits, _ = model(x)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(2, 6)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / 9)):
        torch.testing.assert_close(model(x, targets=y, reduction=reduction)[0], value)


def test_it_begins_near_chance_and_learns() -> None:
    model = small().train()
    x = torch.arange(12).repeat(4, 2)  # a text that one token decides
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(120):
        loss, _ = model(x[:, :-1], targets=x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.log(torch.tensor(VOCAB)).item(), abs=0.3)
    assert losses[-1] < 0.2


def test_greedy_generation_is_the_argmax_and_each_prompt_is_alone() -> None:
    model = small()
    prompts = [tokens(5).tolist(), tokens(2).tolist(), tokens(5).flip(0).tolist(), [3]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(70):  # beyond block_size: a recurrent model has no longest context
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        expected.append(ids)
    together = model.generate(prompts, 70, temperature=0)
    assert [row.tolist() for row in together] == expected
    assert model.generate(torch.tensor([prompts[0], prompts[2]]), 3, temperature=0).tolist() == [
        expected[0][:8],
        expected[2][:8],
    ]


def test_generation_options() -> None:
    model = small()
    prompts = [[1, 2, 3], [4], [5, 6]]
    draws = [
        [r.tolist() for r in model.generate(prompts, 8, top_k=9, generator=torch.Generator().manual_seed(s))]
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    seen: list[tuple[int, int]] = []
    eos = model.generate([[4]], 1, temperature=0)[0][-1].item()
    rows = model.generate(prompts, 6, temperature=0, eos_token=eos, stream=lambda row, t: seen.append((row, t)))
    assert rows[1].tolist() == [4, eos]
    assert [t for row, t in seen if row == 0] == rows[0].tolist()[3:]
    pair = torch.tensor([[4], [1]])
    assert model.generate(pair, 6, temperature=0, eos_token=eos)[0].tolist() == [4] + 6 * [eos]
    padded = model.generate(pair, 6, temperature=0, eos_token=eos, pad_token=7)
    assert padded.shape == (2, 7) and padded[0].tolist() == [4, eos] + 5 * [7]
    penalised = model.generate([[1, 2]], 10, temperature=0, repetition_penalty=1e6)[0].tolist()
    assert len(set(penalised)) == len(penalised)
    assert model.generate([], 3) == [] and [r.tolist() for r in model.generate([[1]], 0)] == [[1]]
    for idx, options, message in (
        ([[]], {}, "prompt 0 is empty: give at least one token"),
        ([[1.5]], {}, "integer token ids"),
        (torch.ones(3, dtype=torch.int64), {}, r"shape \(B, T\)"),
        ([[1]], {"max_new_tokens": -1}, "must not be negative"),
        ([[VOCAB]], {}, "token id 23; this model knows 0 to 22"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(idx, **{"max_new_tokens": 2, **options})


def test_a_folder_keeps_every_bit(tmp_path: Path) -> None:
    model = small(dropout=0.1, block_size=33)
    model.save_pretrained(tmp_path / "m")
    again = fastlm.LSTMLM.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="format 'fastlm' only"):
        model.save_pretrained(tmp_path / "x", format="huggingface")
    os.truncate(tmp_path / "m" / "model.safetensors", 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        fastlm.LSTMLM.from_pretrained(tmp_path / "m")
    small().save_pretrained(tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    fields["config"]["hidden_dim"] = 21
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"has shape \(\d+.*wanted"):
        fastlm.LSTMLM.from_pretrained(tmp_path / "m")
    fields["model_type"] = "gpt2"
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="of the type 'gpt2'"):
        fastlm.LSTMLM.from_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        fastlm.LSTMLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be an integer of at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"tie_embeddings": True, "embedding_dim": 3}, "embedding_dim == hidden_dim, got 3 and 512"),
        ({"n_layer": 2}, "no field 'n_layer'"),
    ],
)
def test_bad_configurations(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTMConfig.from_dict(fields)


def test_bad_input() -> None:
    model = small()
    for x, hidden, message in (
        (tokens(3), None, r"x must have shape \(B, T\)"),
        (tokens(2, 0), None, "T at least 1"),
        (torch.ones(2, 2), None, "token ids, got torch.float32"),
        (torch.full((1, 2), -1), None, "token id -1"),
        (tokens(2, 3), (torch.zeros(2, 3, 20), torch.zeros(2, 2, 20)), r"\(L, B, H\) = \(2, 2, 20\), got \(2, 3, 20\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, hidden)
    with pytest.raises(ValueError, match="targets must have x's shape"):
        model(tokens(2, 3), targets=tokens(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(2, 12)}, r"gates must have shape \(B, T, 4H\)"),
        ({"gates": torch.ones(2, 3, 10)}, "multiple of 4, got 10"),
        ({"gates": torch.ones(2, 0, 12)}, "at least one step"),
        ({"h0": torch.ones(2, 4)}, r"h0 must have shape \(B, H\) = \(2, 3\), got \(2, 4\)"),
        ({"weight": torch.ones(3, 12)}, r"weight must have shape \(4H, H\)"),
        ({"c0": torch.ones(2, 3).double()}, "c0 is torch.float64"),
    ],
)
def test_the_op_refuses_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {
        "gates": torch.ones(2, 3, 12),
        "h0": torch.ones(2, 3),
        "c0": torch.ones(2, 3),
        "weight": torch.ones(12, 3),
    }
    with pytest.raises(ValueError, match=message):
        ops.lstm(**{**arguments, **change})


@pytest.mark.skipif(native.cpu_unavailable() is not None, reason=str(native.cpu_unavailable()))
def test_the_same_bits_on_1_2_and_3_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(32, 3, 4 * 130, generator=generator).requires_grad_()
    weight = (torch.randn(4 * 130, 130, generator=generator) / 11).requires_grad_()
    zeros = torch.zeros(32, 130)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fastlm.backend("cpu"):
                y, c = ops.lstm(gates, zeros, zeros, weight)
            (dgates,) = torch.autograd.grad(y.square().sum() + c.sum(), [gates])
            results.append((y.detach(), c.detach(), dgates))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
