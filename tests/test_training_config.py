"""Settings: TOML, overrides, errors that help; the learning-rate schedules; the table of devices."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from fastlm.models.config import GPTConfig
from fastlm.training.config import TrainingConfig, config_from_dict, config_to_toml, load_config, parse_override
from fastlm.training.flops import peak_flops_of
from fastlm.training.schedule import learning_rate


def test_a_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[training]\nlr = 1\nsteps = 10\n[model]\npreset = "nano"\nn_layer = 2\n')
    config = load_config(path, ["training.lr=3e-4", "data.path=some/folder", "training.compile=true", "model.n_head=2"])
    assert config.training.lr == 3e-4
    assert config.training.steps == 10
    assert config.training.compile is True
    assert config.data.path == "some/folder"
    assert config.model == {"preset": "nano", "n_layer": 2, "n_head": 2}


def test_writing_and_reading_again_gives_the_same(tmp_path: Path) -> None:
    config = config_from_dict(
        {
            "model": {"n_layer": 2, "rope_scaling": {"kind": "linear", "factor": 2.0}, "position": "rotary"},
            "training": {"lr": 1e-30, "schedule": "wsd"},
            "data": {"path": 'C:\\data "x"\n世界 😀 \x7f \u2028'},
            "task": {"options": {"😀": ["ein", "zwei"]}},
        }
    )
    config.model = GPTConfig.from_dict(config.model).to_dict()  # as a run notes it, with a None in rope_scaling
    (tmp_path / "c.toml").write_text(config_to_toml(config), encoding="utf-8")
    again = load_config(tmp_path / "c.toml")
    assert GPTConfig.from_dict(again.model) == GPTConfig.from_dict(config.model)
    assert asdict(again) | {"model": {}} == asdict(config) | {"model": {}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=1", r"unknown key training\.learning_rate \(did you mean 'training\.lr'\?\)"),
        ("training.weight_decay=1", r"unknown key training\.weight_decay \(did you mean 'optimizer\.weight_decay'\?\)"),
        ("training.lrr=1", r"unknown key training\.lrr \(did you mean 'lr'\?\)"),
        ("trainin.lr=1", r"unknown section \[trainin\] \(did you mean 'training'\?\)"),
        ("model.n_layers=1", r"unknown key model\.n_layers \(did you mean 'n_layer'\?\)"),
        ("training.steps=1.5", r"training\.steps must be a whole number, got 1\.5 \(float\)"),
        ("training.steps=true", r"training\.steps must be a whole number, got True"),
        ("training.lr=fast", r"training\.lr must be a number, got 'fast'"),
        ("training.compile=1", r"training\.compile must be true or false"),
        ("model.n_layer='2'", r"model\.n_layer must be a whole number, got '2'"),
        ("training.schedule=cosin", r"training\.schedule must be one of cosine, linear, wsd, constant, got 'cosin'"),
        ("training.precision=fp8", r"training\.precision must be one of"),
        ("data.order=sorted", r"data\.order must be one of"),
        ("training.steps=0", r"training\.steps must be at least 1, got 0"),
        ("evaluation.every=-1", r"evaluation\.every must be at least 0"),
        ("checkpoint.keep_last=0", r"checkpoint\.keep_last must be at least 1"),
        ("training.lr=0", r"training\.lr must be positive"),
        ("training.lr=nan", r"training\.lr must be positive"),
        ("training.lr=inf", r"training\.lr must be positive and finite"),
        ("training.grad_clip=nan", r"training\.grad_clip must be at least 0, got nan"),
        ("training.seed=-1", r"training\.seed must be at least 0 and below 2\^63, got -1"),
        ("optimizer.beta1=1.0", r"optimizer\.beta1 must be at least 0 and below 1, got 1\.0"),
        ("evaluation.every=0", r"evaluation\.patience=2 needs evaluations on the way, and evaluation\.every is 0"),
        ("training.lr", r"wanted an override like training\.lr=3e-4, got 'training\.lr'"),
        ("lr=1", r"wanted an override like"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, ["evaluation.patience=2", override])


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such config file: .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("[training\n")
    with pytest.raises(ValueError, match=r"bad\.toml is not TOML"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "flat.toml").write_text("training = 3\n")
    with pytest.raises(ValueError, match="training must be a section with keys, got 3"):
        load_config(tmp_path / "flat.toml")


def test_overrides_keep_text_that_is_no_toml() -> None:
    assert parse_override("data.path=/a/b c") == ("data", "path", "/a/b c")
    assert parse_override("evaluation.prompt='x = 1'") == ("evaluation", "prompt", "x = 1")
    assert parse_override("evaluation.prompt=a=b") == ("evaluation", "prompt", "a=b")


def schedule(**settings: object) -> list[float]:
    config = config_from_dict({"training": {"lr": 1.0, "min_lr_ratio": 0.1, **settings}}).training
    return [learning_rate(step, config) for step in range(config.steps)]


def test_every_schedule_warms_up_and_ends_where_it_should() -> None:
    for kind, last in (("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)):
        rates = schedule(schedule=kind, steps=100, warmup_steps=10)
        assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert max(rates) == pytest.approx(1.0)
        assert rates[-1] == pytest.approx(last)
        assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_shapes_of_the_schedules() -> None:
    half = {"steps": 101, "warmup_steps": 1}
    assert schedule(schedule="cosine", **half)[50] == pytest.approx(0.55)
    assert schedule(schedule="cosine", **half)[25] > schedule(schedule="linear", **half)[25] == pytest.approx(0.775)
    wsd = schedule(schedule="wsd", decay_fraction=0.2, **half)
    assert wsd[80] == 1.0 and wsd[81] < 1.0
    assert wsd[90] == pytest.approx(1 - 0.9 * 0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 100), (5, 5), (2, 1)])
def test_short_runs_have_a_rate(kind: str, steps: int, warmup: int) -> None:
    assert all(0 < lr <= 1 for lr in schedule(schedule=kind, steps=steps, warmup_steps=warmup))


def test_the_defaults_are_valid() -> None:
    assert load_config().training == TrainingConfig()


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 311.9e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.1e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("Some H1000", None),
    ],
)
def test_the_peak_of_a_device_is_from_the_table_or_unknown(name: str, bf16: float | None) -> None:
    assert peak_flops_of(name, "bf16") == (pytest.approx(bf16) if bf16 else None)
