"""How a backend is chosen, asked for and refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm import ops
from fastlm.ops import registry
from tests.conftest import ROOT

X, W = torch.randn(3, 8), torch.ones(8)


def test_an_unknown_backend_is_named_with_the_nearest() -> None:
    message = r"no backend 'cude' \(did you mean 'cuda'\?\); the backends are: auto, cuda"
    with pytest.raises(ValueError, match=message), fastlm.backend("cude"):
        pass


def test_the_setting_nests_and_survives_errors() -> None:
    with fastlm.backend("reference"):
        with pytest.raises(RuntimeError, match="boom"), fastlm.backend("auto"):
            raise RuntimeError("boom")
        assert ops.explain("layer_norm", X, W).chosen == "reference"
    assert registry._forced == "auto"


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("the point is a machine without a GPU")
    message = "runs on cuda tensors, and these are on cpu"
    with fastlm.backend("cuda"), pytest.raises(fastlm.UnsupportedError, match=message):
        ops.layer_norm(X, W)


def test_the_backward_runs_where_the_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    reference = registry.implementation("layer_norm", "reference")
    original = reference.backward
    monkeypatch.setattr(reference, "backward", lambda *a: ran.append("reference") or original(*a))
    x = X.clone().requires_grad_()
    with fastlm.backend("reference"):
        y = ops.layer_norm(x, W)
    y.sum().backward()
    assert ran == ["reference"]


def test_explain_refuses_an_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"no op 'layernorm' \(did you mean 'layer_norm'\?\)"):
        ops.explain("layernorm", X, W)


def test_explain_takes_the_function_too() -> None:
    assert str(ops.explain(ops.layer_norm, X, W)) == str(ops.explain("layer_norm", X, W))


def test_the_table_has_every_op_and_backend() -> None:
    table = registry.table()
    assert {"layer_norm", "rms_norm", "attention", "mlp", "linear_act", "linear_cross_entropy"} <= set(table)
    for row in table.values():
        assert set(row) == set(registry.NAMES) and row["reference"] is None


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
    )


def test_the_environment_variable_sets_the_backend() -> None:
    code = "import fastlm, torch; print(fastlm.ops.explain('layer_norm', torch.ones(2, 8), torch.ones(8)).chosen)"
    assert _python(code, FASTLM_BACKEND="reference").stdout.strip() == "reference"
    wrong = _python(code, FASTLM_BACKEND="fastest")
    assert wrong.returncode != 0 and "FASTLM_BACKEND='fastest': there is no such backend" in wrong.stderr


def test_a_wrong_backend_of_the_environment_runs_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_forced", "cup")
    with pytest.raises(ValueError, match=r"FASTLM_BACKEND='cup': there is no such backend \(did you mean 'cpu'\?\)"):
        ops.layer_norm(X, W)
    with fastlm.backend("reference"):
        assert ops.layer_norm(X, W).shape == X.shape
