"""fastlm.GPT: against a textbook in plain PyTorch, and its promises one by one."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import ops
from fastlm.nn import alibi_slopes
from fastlm.nn.rotary import RopeScaling, Rotary, rotary_frequencies
from fastlm.ops.attention.cases import slices
from tests import textbook_gpt

TINY = {"vocab_size": 61, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False, "tie_embeddings": False}

VARIANTS = {
    "gpt2": {},
    "no-bias": {"bias": False},
    "untied": {"tie_embeddings": False},
    "llama": LLAMA,
    "llama-gqa": {**LLAMA, "n_kv_head": 2},
    "llama-mqa": {**LLAMA, "n_kv_head": 1, "tie_embeddings": True},
    "wide-heads": {**LLAMA, "head_dim": 16, "n_kv_head": 2},
    "odd-embedding": {"n_embd": 36, "head_dim": 8, "n_head": 4, "activation": "relu2"},
    "sinusoidal": {"position": "sinusoidal", "activation": "gelu"},
    "alibi": {"position": "alibi", "activation": "relu"},
    "alibi-window": {"position": "alibi", "sliding_window": 5},
    "rotary-layer-norm": {"position": "rotary", "activation": "geglu", "rope_theta": 100.0},
    "rms-learned": {"norm": "rms_norm", "activation": "silu"},
    "softcaps": {"attention_softcap": 3.0, "logit_softcap": 4.0},
    "window": {**LLAMA, "sliding_window": 6},
    "scale": {"attention_scale": 1.0},
    "qkv-bias": {**LLAMA, "qkv_bias": True},
    "qk-norm": {"qk_norm": True},
    "qk-norm-rotary": {**LLAMA, "qk_norm": True, "n_kv_head": 2, "head_dim": 16},
    "one-layer": {"n_layer": 1, "n_head": 1},
}


def tiny(**changes) -> fastlm.GPT:
    """A small model whose every parameter is random, biases and norms too, and large enough to matter."""
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.from_dict({**TINY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() < 2 else 0.15))
    return model


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_textbook(name):
    """Logits, loss, and the gradient of every parameter."""
    model, other = tiny(**VARIANTS[name]), tiny(**VARIANTS[name])
    idx, targets = tokens(), tokens(seed=2)
    targets[0, :7] = -100
    logits, none = model(idx)
    expected = textbook_gpt.logits(other, idx)
    assert none is None and logits.shape == (2, 24, 61)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)

    no_logits, loss = model(idx, targets)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert no_logits is None and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, atol=2e-5, rtol=2e-5)

    loss.backward()
    expected_loss.backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=2e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_loss_options():
    model, idx, targets = tiny(), tokens(), tokens(seed=2)
    targets[1, 3:9] = -100
    logits, loss = model(idx, targets, return_logits=True)
    torch.testing.assert_close(logits, model(idx)[0])
    each = model(idx, targets, reduction="none")[1]
    assert each.shape == (2, 24) and bool((each[1, 3:9] == 0).all())
    torch.testing.assert_close(each.sum() / (targets != -100).sum(), loss)
    torch.testing.assert_close(model(idx, targets, reduction="sum")[1], each.sum())
    smoothed = model(idx, targets, label_smoothing=0.1)[1]
    flat = logits.flatten(0, 1), targets.flatten()
    torch.testing.assert_close(smoothed, F.cross_entropy(*flat, ignore_index=-100, label_smoothing=0.1))
    z = torch.logsumexp(logits, -1)[targets != -100].square().mean()
    torch.testing.assert_close(model(idx, targets, z_loss=0.01)[1], loss + 0.01 * z)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "alibi"])
def test_the_future_changes_nothing(position):
    model, idx = tiny(position=position), tokens()
    changed = idx.clone()
    changed[:, 10:] = tokens(seed=3)[:, 10:]
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=1e-5)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "alibi"])
def test_positions_matter(position):
    model, idx = tiny(position=position), tokens()
    swapped = idx.clone()
    swapped[:, [3, 8]] = idx[:, [8, 3]]
    assert (model(idx)[0][:, -1] - model(swapped)[0][:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "alibi"])
def test_packed_sequences_are_each_alone(position):
    model = tiny(position=position)
    parts = [tokens(1, n, seed=n) for n in (5, 1, 24, 9)]
    cu_seqlens = torch.tensor([0, 5, 6, 30, 39], dtype=torch.int32)
    packed = model(torch.cat(parts, dim=1), cu_seqlens=cu_seqlens, max_seqlen=24)[0]
    for part, logits in zip(parts, packed.split([5, 1, 24, 9], dim=1), strict=True):
        torch.testing.assert_close(logits, model(part)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {**LLAMA, "n_kv_head": 2}], ids=["gpt2", "llama"])
def test_gradient_checkpointing_changes_no_bit(changes):
    plain, saving = tiny(dropout=0.2, **changes), tiny(dropout=0.2, **changes)
    saving.gradient_checkpointing = True
    for model in (plain, saving):
        torch.manual_seed(5)
        model(tokens(), tokens(seed=2))[1].backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_dropout_only_in_training():
    model, idx = tiny(dropout=0.3), tokens()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    torch.testing.assert_close(model(idx)[0], textbook_gpt.logits(model, idx), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "changes", [{}, {**LLAMA, "n_kv_head": 2}, {"position": "alibi"}], ids=["gpt2", "llama", "alibi"]
)
def test_autocast(changes):
    """Products in bf16, the residual stream and the loss in fp32; gradients as near as bf16 lets them be."""
    model, idx, targets = tiny(**changes), tokens(), tokens(seed=2)
    seen: list[torch.dtype] = []
    model.norm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["residual"].dtype), with_kwargs=True
    )
    exact = model(idx, targets)[1]
    exact.backward()
    wanted = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)[1]
        assert model(idx)[0].dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == torch.float32 and set(seen) == {torch.float32}
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    for key, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad - wanted[key]).norm() < 0.1 * wanted[key].norm(), key


def test_whole_model_in_bfloat16():
    model, idx = tiny(**LLAMA), tokens()
    low = copy.deepcopy(model).bfloat16()
    assert low.rotary.frequencies.value.dtype == torch.float32  # positions keep their precision
    difference = (low(idx)[0].float() - model(idx)[0]).norm() / model(idx)[0].norm()
    assert low(idx)[0].dtype == torch.bfloat16 and 0 < difference < 0.05


@pytest.mark.parametrize("changes", [{}, {**LLAMA, "n_kv_head": 2}], ids=["gpt2", "llama"])
def test_compiles_in_one_graph(changes):
    model, idx, targets = tiny(**changes), tokens(), tokens(seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(idx, targets)[1]
    expected.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = compiled(idx, targets)[1]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for p, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2, "attention_dropout": 0.2}], ids=["gpt2", "gqa"])
def test_the_gradient_of_a_projection_is_made_in_place(changes, monkeypatch):
    """Without a concatenation, and with its bits."""
    seen = set()

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    def gradients():
        model = tiny(**changes)
        model(tokens(), tokens(seed=2))[1].backward()
        return [p.grad for p in model.parameters()]

    with Spy():
        found = gradients()
    assert "fastlm::attention_qkvpacked_backward" in seen
    assert not {"aten::cat", "fastlm::attention_backward"} & seen
    monkeypatch.setattr(
        ops, "attention_qkvpacked", lambda qkv, *heads, **options: ops.attention(*slices(qkv, *heads), **options)
    )
    for a, b in zip(found, gradients(), strict=True):
        assert torch.equal(a, b)


def test_tied_head_is_one_parameter():
    model = tiny()
    assert model.head_weight is model.wte.weight and "lm_head.weight" not in model.state_dict()
    untied = tiny(tie_embeddings=False)
    assert untied.head_weight is not untied.wte.weight
    assert untied.num_parameters() - model.num_parameters() == 61 * 32


def test_initialisation():
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.preset("nano"))
    state = dict(model.named_parameters())
    for name, std in {
        "wte.weight": 0.02,
        "blocks.0.attention.qkv.weight": 0.02,
        "blocks.3.attention.proj.weight": 0.02 / math.sqrt(8),
        "blocks.1.mlp.proj.weight": 0.02 / math.sqrt(8),
    }.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.05), name
    assert torch.equal(state["norm.weight"], torch.ones(128))
    idx = torch.randint(0, 256, (4, 64))
    assert model(idx, torch.randint(0, 256, (4, 64)))[1].item() == pytest.approx(math.log(256), abs=0.05)


def test_sizes_of_gpt2():
    """124,439,808 parameters, and the FLOPs that nanoGPT counts for it at T = 1024."""
    with torch.device("meta"):
        model = fastlm.GPT(fastlm.GPTConfig.preset("gpt2"))
        llama = fastlm.GPT(fastlm.GPTConfig.preset("llama-3.2-1b"))
    assert model.num_parameters() == 124_439_808
    assert model.num_parameters(non_embedding=True) == 124_439_808 - 1024 * 768
    assert model.flops_per_token(1024) == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    assert llama.num_parameters() == 1_235_814_400


def test_flops_count_the_window_and_the_untied_head():
    model = tiny(**{**LLAMA, "sliding_window": 6, "head_dim": 16})
    matrices = model.num_parameters() - 61 * 32  # the token table is only looked up
    assert model.flops_per_token(24) == 6 * matrices + 12 * 2 * 4 * 16 * 6


def test_moves_pickles_and_copies():
    model, idx = tiny(**LLAMA), tokens()
    expected = model(idx)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(idx)[0], expected)
    with torch.device("meta"):
        empty = fastlm.GPT(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(idx)[0], expected)


def test_a_model_learns():
    torch.manual_seed(0)
    model = fastlm.GPT(fastlm.GPTConfig.from_dict({**TINY, **LLAMA, "n_kv_head": 2}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = torch.arange(25).repeat(4, 1)
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), ValueError, r"shape \(B, T\), got \(3,\)"),
        (lambda m: m(torch.zeros(1, 3)), ValueError, "int64 or int32 token ids, got torch.float32"),
        (lambda m: m(torch.zeros(1, 25, dtype=torch.int64)), ValueError, "25 tokens is longer than block_size = 24"),
        (lambda m: m(torch.tensor([[0, 61]])), ValueError, "token id 61; this model knows 0 to 60"),
        (lambda m: m(torch.tensor([[0, -1]])), ValueError, "token id -1; this model knows 0 to 60"),
        (lambda m: m(tokens(), tokens()[:, 1:]), ValueError, r"idx's shape \(2, 24\), got \(2, 23\)"),
        (lambda m: m(tokens(), tokens() * 0 + 61), IndexError, "61"),
        (
            lambda m: m(tokens(), cu_seqlens=torch.tensor([0, 24])),
            ValueError,
            r"shape \(1, T\) and no cache; got \(2, 24\)",
        ),
        (
            lambda m: m(tokens(1, 30), cu_seqlens=torch.tensor([0, 30], dtype=torch.int32), max_seqlen=30),
            ValueError,
            "30 tokens is longer than block_size = 24",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30}, r"n_embd \(30\) must be a multiple of n_head \(4\)"),
        ({"n_kv_head": 3}, r"n_head \(4\) must be a multiple of n_kv_head \(3\)"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1, got 0"),
        ({"vocab_size": 61.0}, "vocab_size must be an integer"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm": "layernorm"}, r"got 'layernorm' \(did you mean 'layer_norm'\?\)"),
        ({"activation": "gelu_new"}, "activation must be one of gelu_tanh"),
        ({"position": "rope"}, "position must be one of learned"),
        ({"position": "rotary", "head_dim": 7}, "even head dimension, got 7"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling needs position='rotary'"),
        ({"position": "rotary", "rope_theta": 1.0, "rope_scaling": {"kind": "yarn"}}, "needs a rope_theta above 1"),
        ({"position": "rotary", "rope_scaling": {"original_block_size": 0}}, "original_block_size must be at least 1"),
        ({"position": "rotary", "rope_scaling": 3}, "rope_scaling must be a RopeScaling, a dict"),
        ({"position": "rotary", "rope_scaling": {"scale": 2.0}}, "rope_scaling has no field 'scale'"),
        (
            {"position": "rotary", "rope_scaling": {"factor": 0.5}},
            "factor must be at least 1 .linear: above 0., got 0.5",
        ),
        ({"position": "rotary", "rope_scaling": {"kind": "linear", "factor": 0.0}}, "factor must be at least 1"),
        (
            {"position": "rotary", "rope_scaling": {"low_freq_factor": 5.0}},
            "not above high_freq_factor, got 5.0 and 4.0",
        ),
        ({"position": "rotary", "rope_scaling": {"kind": "ntk"}}, "kind must be llama3, linear or yarn, got 'ntk'"),
        ({"position": "rotary", "rope_scaling": {"kind": "yarn", "beta_slow": 40.0}}, "beta_slow must be positive and"),
        ({"position": "rotary", "rope_scaling": {"attention_factor": 1.0}}, "attention_factor is YaRN's"),
        ({"norm": "rms_norm", "norm_bias": True}, "has no bias"),
        ({"n_heads": 4}, r"no field 'n_heads' \(did you mean 'n_head'\?\)"),
        ({"logit_softcap": -1.0}, "logit_softcap must not be negative"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        fastlm.GPTConfig.from_dict({**TINY, **fields})


def test_presets_and_changes():
    from fastlm.models.presets import PRESETS

    for name in PRESETS:
        config = fastlm.GPTConfig.preset(name)
        assert fastlm.GPTConfig.from_dict(config.to_dict()) == config
    wider = dataclasses.replace(fastlm.GPTConfig.preset("gpt2"), n_embd=1536)
    assert (wider.head_size, wider.mlp_size, wider.kv_heads) == (128, 6144, 12)
    dropped = fastlm.GPTConfig.preset("nano", dropout=0.1, attention_dropout=0.0)
    assert (dropped.dropout, dropped.attention_dropout_p, dropped.embedding_dropout_p) == (0.1, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"no preset 'gpt2-midium' \(did you mean 'gpt2-medium'\?\)"):
        fastlm.GPTConfig.preset("gpt2-midium")


def test_alibi_slopes_are_the_papers():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    twelve = alibi_slopes(12)
    torch.testing.assert_close(twelve[:8], alibi_slopes(8))
    torch.testing.assert_close(twelve[8:], torch.tensor([2.0 ** (-i / 2) for i in (1, 3, 5, 7)]))


def test_rope_scaling():
    plain = rotary_frequencies(64, 500000.0)
    scaled = rotary_frequencies(64, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    wavelength = 2 * math.pi / plain
    torch.testing.assert_close(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert bool(between.any()) and bool(((scaled < plain) & (scaled > plain / 8))[between].all())
    torch.testing.assert_close(rotary_frequencies(8, 10.0, RopeScaling("linear", 2.0)), rotary_frequencies(8, 10.0) / 2)


def test_norms_of_queries_alone_can_be_trained():
    model = tiny(**{**LLAMA, "qk_norm": True, "n_layer": 1})
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("q_norm.weight", "k_norm.weight")))
    model(tokens(), tokens())[1].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_yarn():
    scaling = RopeScaling("yarn", 4.0, original_block_size=4096)
    plain, scaled = rotary_frequencies(128, 10000.0), rotary_frequencies(128, 10000.0, scaling)
    turns = 4096 * plain / (2 * math.pi)
    torch.testing.assert_close(scaled[turns > 33], plain[turns > 33])
    torch.testing.assert_close(scaled[turns < 0.9], plain[turns < 0.9] / 4)
    between = (turns < 28) & (turns > 1.2)
    assert bool(between.any()) and bool(((scaled < plain) & (scaled > plain / 4))[between].all())

    positions = torch.arange(5)
    for expected, options in ((0.1 * math.log(4) + 1, {}), (0.7, {"attention_factor": 0.7})):
        cos, sin = Rotary(128, 10000.0, dataclasses.replace(scaling, **options))(positions)
        torch.testing.assert_close(torch.hypot(cos, sin), torch.full((5, 64), expected))
