"""The settings of a run: dataclasses, filled from TOML and `section.key=value` overrides, checked at once."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.loader import ORDERS
from fastlm.hints import did_you_mean, meant
from fastlm.models.lora import TARGETS as LORA_TARGETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
PARALLEL = ("ddp", "fsdp")
OBJECTIVES = ("causal", "masked", "recurrent")


@dataclass
class DataConfig:
    """Which text."""

    path: str = ""  # a folder made by `fastlm prepare`
    order: str = "random"  # random windows, or "shuffled": every window once an epoch


@dataclass
class TrainingConfig:
    """How to train."""

    objective: str = "causal"  # predict the next token (fastlm.GPT); "masked": the tokens left out
    # (fastlm.Encoder); "recurrent": the next token, with truncated backpropagation through time (fastlm.LSTMLM)
    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # windows in one forward pass
    grad_accum: int = 1  # forward passes for one optimizer step
    lr: float = 6e-4  # at the top of the schedule
    min_lr_ratio: float = 0.1  # the schedule ends at lr * min_lr_ratio
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # schedule "wsd": the part of the steps in which lr falls
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    max_minutes: float = 0.0  # save and stop after so long, counted anew after a resume; 0: never
    seed: int = 0
    precision: str = "auto"  # "bf16": autocast; "auto": bf16 on a GPU that has it, else fp32
    device: str = "auto"  # "cpu", "cuda", "cuda:1", …; "auto": a GPU where there is one
    keep_memory: bool = True  # on a CPU: the process keeps freed memory for its next step (allocator.py)
    compile: bool = False  # torch.compile the model
    cuda_graph: bool = True  # on one GPU, replay a GPT's passes instead of launching their kernels one by one
    parallel: str = "ddp"  # several processes: each holds the model ("ddp") or a part of it ("fsdp", FSDP2)
    gradient_checkpointing: bool = False  # keep only the blocks' inputs, recompute the rest in the backward pass


@dataclass
class MaskingConfig:
    """Which tokens a masked model has to predict, and what stands in their place (Devlin et al., arXiv:1810.04805)."""

    rate: float = 0.15  # of the tokens
    mask: float = 0.8  # of those: the mask token
    random: float = 0.1  # of those: any other token; the rest stays as it is
    whole_word: bool = False  # choose words, not tokens


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., arXiv:2106.09685): train these alone, and the model stays as it is."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float = 16.0  # the adapters' sum is scaled by alpha / rank
    targets: str = "qv"  # which projections: "qv" (peft's default), "attention", or "all"


@dataclass
class OptimizerConfig:
    """AdamW."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; vectors (norms, biases) are not decayed


@dataclass
class EvaluationConfig:
    """What is looked at on the way."""

    every: int = 100  # steps between evaluations on the validation split; 0: only at the end
    windows: int = 64  # at even distances over the split, the same every time; no more than cover it once
    patience: int = 0  # stop after so many evaluations without a better one; 0: never
    sample_every: int = 0  # steps between samples; 0: none
    sample_tokens: int = 100
    prompt: str = ""


@dataclass
class CheckpointConfig:
    """What is kept."""

    every: int = 500  # steps between checkpoints (one is written at the end in any case); 0: only at the end
    keep_last: int = 2
    keep_best: bool = True  # the one with the lowest validation loss, beside the last ones


@dataclass
class LoggingConfig:
    """Where numbers go, beside log.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: str = "fastlm"


@dataclass
class RunConfig:
    """Everything that defines a run.

    `model` holds a `preset` and/or fields of `fastlm.GPTConfig`, or of `fastlm.EncoderConfig` for a masked objective.
    `task` is there in a fine-tuning run: its `name`, the `model` it began with, and the settings of its module in
    `fastlm.tasks`, which checks them.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    task: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self) -> None:
        """Raise ValueError for values that make no sense together or alone."""
        t, e, c, o = self.training, self.evaluation, self.checkpoint, self.optimizer
        m, lora = self.masking, self.lora
        _one_of("training.objective", t.objective, OBJECTIVES)
        _one_of("lora.targets", lora.targets, LORA_TARGETS)
        _one_of("training.precision", t.precision, PRECISIONS)
        _one_of("training.schedule", t.schedule, SCHEDULES)
        _one_of("training.parallel", t.parallel, PARALLEL)
        _one_of("data.order", self.data.order, ORDERS)
        for name, least_zero in (
            ("training.warmup_steps", t.warmup_steps),
            ("training.grad_clip", t.grad_clip),
            ("training.max_minutes", t.max_minutes),
            ("evaluation.every", e.every),
            ("evaluation.patience", e.patience),
            ("evaluation.sample_every", e.sample_every),
            ("checkpoint.every", c.every),
            ("optimizer.weight_decay", o.weight_decay),
            ("lora.rank", lora.rank),
        ):
            _at_least(name, least_zero, 0)
        for name, least_one in (
            ("training.steps", t.steps),
            ("training.batch_size", t.batch_size),
            ("training.grad_accum", t.grad_accum),
            ("evaluation.windows", e.windows),
            ("evaluation.sample_tokens", e.sample_tokens),
            ("checkpoint.keep_last", c.keep_last),
        ):
            _at_least(name, least_one, 1)
        for name, number in (("training.lr", t.lr), ("optimizer.eps", o.eps), ("lora.alpha", lora.alpha)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number}")
        for name, part in (
            ("training.min_lr_ratio", t.min_lr_ratio),
            ("training.decay_fraction", t.decay_fraction),
            ("masking.rate", m.rate),
            ("masking.mask", m.mask),
            ("masking.random", m.random),
        ):
            if not 0 <= part <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {part}")
        for name, beta in (("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {beta}")
        if e.patience and not e.every:
            raise ValueError(
                f"evaluation.patience={e.patience} needs evaluations on the way, and evaluation.every is 0: "
                "there is one at the end alone"
            )
        if not 0 <= t.seed < 2**63:
            raise ValueError(f"training.seed must be at least 0 and below 2^63, got {t.seed}")
        if not m.rate or m.mask + m.random > 1:
            raise ValueError(
                f"masking.rate must be above 0 and masking.mask + masking.random at most 1, got {m.rate} and "
                f"{m.mask} + {m.random}"
            )


def load_config(
    path: str | Path | None = None,
    overrides: typing.Sequence[str] = (),
    defaults: dict[str, dict[str, Any]] | None = None,
) -> RunConfig:
    """A RunConfig from a TOML file (None: the defaults) and overrides such as "training.lr=3e-4".

    The right side of an override is TOML; what is not TOML is taken as a string. `defaults` stand under the file, in
    the place of the dataclasses' own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown section or key (the nearest known one is named), a wrong type, or a value
            out of range.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such config file: {path}")
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not TOML: {e}") from None
    for section, table in (defaults or {}).items():
        given = tables.setdefault(section, {})
        if isinstance(given, dict):
            tables[section] = {**table, **given}
    for override in overrides:
        section, key, value = parse_override(override)
        tables.setdefault(section, {})
        if isinstance(tables[section], dict):
            tables[section][key] = value
    return config_from_dict(tables)


def config_from_dict(tables: dict[str, Any]) -> RunConfig:
    """A checked RunConfig from nested dicts; ValueError as for `load_config`."""
    config = RunConfig()
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, table in tables.items():
        if name not in sections:
            raise ValueError(
                f"unknown section [{name}]{did_you_mean(name, sections)}; there are: {', '.join(sections)}"
            )
        if not isinstance(table, dict):
            raise ValueError(f"{name} must be a section with keys, got {table!r}")
        if name == "model":
            training = tables.get("training")
            objective = training.get("objective", "causal") if isinstance(training, dict) else "causal"
            hints = _model_hints(objective)
            config.model = {key: _checked_model_value(key, value, hints) for key, value in table.items()}
            continue
        if name == "task":
            config.task = table
            continue
        hints = typing.get_type_hints(type(sections[name]))
        for key, value in table.items():
            if key not in hints:
                raise ValueError(f"unknown key {name}.{key}{_hint(key, hints)}; there are: {', '.join(hints)}")
            setattr(sections[name], key, _typed(f"{name}.{key}", value, hints[key]))
    config.validate()
    return config


def parse_override(text: str) -> tuple[str, str, Any]:
    """("training", "lr", 0.0003) from "training.lr=3e-4"."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ValueError(f"wanted an override like training.lr=3e-4, got {text!r}")
    try:
        return section, key, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, raw.strip()


def override(name: str, value: object) -> str:
    """What `parse_override` reads as this name and the text of this value, whatever quotes are in it."""
    return f"{name}={json.dumps(str(value), ensure_ascii=False)}"


def config_to_toml(config: RunConfig) -> str:
    """The whole config as TOML, every default written out."""
    lines: list[str] = []
    for name, table in dataclasses.asdict(config).items():
        lines += [
            f"[{name}]",
            *(f"{key} = {_toml_value(value)}" for key, value in table.items() if value is not None),
            "",
        ]
    return "\n".join(lines)


def section_from_dict(cls: type, name: str, table: dict[str, Any]) -> Any:
    """A dataclass of settings from a table, with the same errors as `load_config`: for the settings of a task.

    A whole number passes for a string: columns and labels may be called 0 and 1.
    """
    section, hints = cls(), typing.get_type_hints(cls)
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"unknown key {name}.{key}{did_you_mean(key, hints)}; there are: {', '.join(hints)}")
        if hints[key] is str and type(value) is int:
            value = str(value)
        setattr(section, key, _typed(f"{name}.{key}", value, hints[key]))
    return section


def _model_hints(objective: str) -> dict[str, Any]:
    from fastlm.models.config import GPTConfig
    from fastlm.models.encoder_config import EncoderConfig
    from fastlm.models.lstm import LSTMConfig

    kinds: dict[str, Any] = {"masked": EncoderConfig, "recurrent": LSTMConfig}
    hints = typing.get_type_hints(kinds.get(objective, GPTConfig))
    return hints if objective == "recurrent" else {"preset": str, **hints}


def _checked_model_value(key: str, value: Any, hints: dict[str, Any]) -> Any:
    if key not in hints:
        raise ValueError(f"unknown key model.{key}{did_you_mean(key, hints)}; there are: {', '.join(hints)}")
    return _typed(f"model.{key}", value, hints[key])


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that the dataclass declares: int passes for float, everything else must be what it says."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        hint = options[0] if len(options) == 1 else None
    if typing.get_origin(hint) is typing.Literal:
        _one_of(name, value, typing.get_args(hint))
        return value
    if hint not in (bool, int, float, str):
        return value  # a structured field of the model: GPTConfig checks it
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name} must be {_TYPE_NAMES[hint]}, got {value!r} ({type(value).__name__})")
    return value


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


# What other trainers call our settings.
_ALSO_CALLED = {
    "learning_rate": "training.lr",
    "max_steps": "training.steps",
    "max_iters": "training.steps",
    "gradient_accumulation_steps": "training.grad_accum",
    "max_grad_norm": "training.grad_clip",
    "eval_interval": "evaluation.every",
    "save_every": "checkpoint.every",
    "lr_scheduler_type": "training.schedule",
}


def _hint(key: str, known: typing.Iterable[str]) -> str:
    """The nearest key of the section; else the setting of that name in another one, or what we call it."""
    sections = dataclasses.asdict(RunConfig())
    elsewhere = {name: f"{section}.{name}" for section, table in sections.items() for name in table}
    name = elsewhere.get(key) or _ALSO_CALLED.get(key)
    return meant(name) if name else did_you_mean(key, known)


def _one_of(name: str, value: Any, choices: typing.Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _at_least(name: str, value: float, least: int) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        fields = {k: v for k, v in value.items() if v is not None}  # TOML has no null; what is not there is None
        return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in fields.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # keeps every digit
    # A JSON string, boolean or number is TOML, too, but for pairs of surrogates and for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
