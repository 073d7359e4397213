"""config.json of BERT and RoBERTa, and EncoderConfig: each from the other."""

from __future__ import annotations

from typing import Any

from fastlm.models.encoder_config import EncoderConfig
from fastlm.models.huggingface.activations import ACTIVATIONS, written_activation

Fields = dict[str, Any]

OWN = "fastlm-encoder"
ENCODERS = ("bert", "roberta", OWN)
_ROBERTA_PADDING = 1  # the id of RoBERTa's padding token; its positions begin behind the row of this number
_ROBERTA_HEAD = "gelu"  # the activation of RoBERTa's head, whatever hidden_act is


def encoder_config_from_huggingface(fields: Fields, *, mlm_head: bool, pooler: bool) -> EncoderConfig:
    """The EncoderConfig of a config.json.

    Args:
        mlm_head, pooler: whether the folder has their weights (config.json does not say so).

    Raises:
        ValueError: an architecture that is no encoder of fastlm's, or an option that fastlm does not have.
    """
    kind = fields.get("model_type")
    if kind not in ENCODERS:
        raise ValueError(f"this folder holds model_type {kind!r}; fastlm.Encoder loads: {', '.join(ENCODERS)}")
    try:
        if kind == OWN:
            return EncoderConfig.from_dict(fields["config"])
        _check_supported(fields, kind)
        offset = 0 if kind == "bert" else _ROBERTA_PADDING + 1
        activation = ACTIVATIONS[fields.get("hidden_act", "gelu")]
        return EncoderConfig(
            vocab_size=fields["vocab_size"],
            block_size=fields.get("max_position_embeddings", 512) - offset,
            n_layer=fields["num_hidden_layers"],
            n_head=fields["num_attention_heads"],
            n_embd=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            type_vocab_size=fields.get("type_vocab_size", 2),
            layout=kind,
            dropout=fields.get("hidden_dropout_prob", 0.1),
            attention_dropout=fields.get("attention_probs_dropout_prob", 0.1),
            norm_eps=fields.get("layer_norm_eps", 1e-12),
            activation=activation,
            head_activation=_ROBERTA_HEAD if kind == "roberta" and activation != _ROBERTA_HEAD else None,
            init_std=fields.get("initializer_range", 0.02),
            mlm_head=mlm_head,
            pooler=pooler,
            mask_token_id=fields.get("mask_token_id"),
        )
    except KeyError as error:
        raise ValueError(f"config.json of model_type {kind!r} lacks the field {error}") from None


def encoder_config_to_huggingface(config: EncoderConfig) -> Fields:
    """The config.json that transformers reads as the same model.

    Raises:
        ValueError: its head has an activation that the architecture's has not.
    """
    head = config.activation if config.layout == "bert" else _ROBERTA_HEAD
    if config.mlm_head and config.masked_activation != head:
        raise ValueError(
            f"transformers' {config.layout} cannot express this model (head_activation is "
            f"{config.masked_activation!r}, not {head!r}); save it with format='fastlm'"
        )
    family = "Bert" if config.layout == "bert" else "Roberta"
    fields: Fields = {
        "model_type": config.layout,
        "architectures": [f"{family}ForMaskedLM" if config.mlm_head else f"{family}Model"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size + config.position_offset,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.mlp_size,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": written_activation(config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout_p,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }
    if config.mask_token_id is not None:
        fields["mask_token_id"] = config.mask_token_id
    if config.layout == "roberta":
        fields |= {"bos_token_id": 0, "pad_token_id": _ROBERTA_PADDING, "eos_token_id": 2}
    return fields


def _check_supported(fields: Fields, kind: str) -> None:
    for name, wanted in (
        ("position_embedding_type", "absolute"),
        ("tie_word_embeddings", True),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if fields.get(name, wanted) != wanted:
            raise ValueError(f"config.json asks for {name}={fields[name]!r}; fastlm.Encoder has {wanted!r} only")
    if fields.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise ValueError(f"hidden_act {fields['hidden_act']!r} is not one of: {', '.join(ACTIVATIONS)}")
    if kind == "roberta" and fields.get("pad_token_id", _ROBERTA_PADDING) != _ROBERTA_PADDING:
        raise ValueError(
            f"roberta with pad_token_id {fields['pad_token_id']} is not supported: its positions begin after that row, "
            f"and fastlm has {_ROBERTA_PADDING} only"
        )
