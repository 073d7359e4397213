"""fastlm.optim.AdamW where other parts of PyTorch have a hand in it: hooks, gradients negated lazily, sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
from fastlm.optim import AdamW
from tests.test_training_distributed import sharding, torchrun


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW])
def test_a_hook_may_change_the_state_dict_that_is_loaded(optimizer: Any) -> None:
    first = optimizer([("a", nn.Parameter(torch.zeros(3))), ("b", nn.Parameter(torch.zeros(3)))])
    for p, value in zip(first.param_groups[0]["params"], (1.0, -2.0), strict=True):
        p.grad = torch.full((3,), value)
    first.step()
    second = optimizer([("b", nn.Parameter(torch.zeros(3))), ("a", nn.Parameter(torch.zeros(3)))])

    def by_name(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved, own = state_dict["param_groups"][0], optimizer.param_groups[0]
        places = [saved["param_names"].index(name) for name in own["param_names"]]
        state = {i: state_dict["state"][saved["params"][place]] for i, place in enumerate(places)}
        group = {**saved, "param_names": own["param_names"], "params": list(range(len(places)))}
        return {"state": state, "param_groups": [group]}

    second.register_load_state_dict_pre_hook(by_name)
    second.load_state_dict(first.state_dict())
    moments = [second.state[p]["exp_avg"][0].item() for p in second.param_groups[0]["params"]]
    assert moments == pytest.approx([-0.2, 0.1])
    assert len(second._optimizer_load_state_dict_pre_hooks) == 1  # none of ours is left

    def sevens(optimizer: Any) -> None:
        for state in optimizer.state.values():
            state["exp_avg"].fill_(7.0)

    second.register_load_state_dict_post_hook(sevens)
    second.load_state_dict(first.state_dict())
    assert all((second.state[p]["exp_avg"] == 7).all() for p in second.param_groups[0]["params"])


def test_gradients_whose_signs_are_yet_to_be_turned() -> None:
    ends = []
    for optimizer in (torch.optim.AdamW, AdamW):
        p = nn.Parameter(torch.tensor([0.5]))
        made = optimizer([p], lr=0.1)
        for _ in range(3):
            p.grad = torch._neg_view(torch.tensor([0.3]))  # what the imaginary part of a conjugate gives
            made.step()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends)


SHARDED = """
import sys, torch, torch.distributed as dist, fastlm
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
results = []
def clipped(model, optimizer, ours):
    if not ours:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return optimizer.step()
    norm, scale = fastlm.optim.clip_grad_norm(model.parameters(), 0.5)
    assert norm > 0.5 and type(norm) is type(scale) is torch.Tensor
    optimizer.step(grad_scale=scale)
for ours, amsgrad in ((False, False), (True, False), (False, True), (True, True)):
    optimizer = fastlm.optim.AdamW if ours else torch.optim.AdamW
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    fully_shard(model)
    made = optimizer(model.parameters(), lr=0.1, amsgrad=amsgrad)
    for step in range(3):
        model(torch.full((4, 8), float(step + dist.get_rank()))).square().sum().backward()
        clipped(model, made, ours)
        made.zero_grad()
    assert all(s["exp_avg"].placements == p.placements for p, s in made.state.items())
    results.append([p.full_tensor() for p in model.parameters()])
for pair in (0, 2):
    for wanted, got in zip(results[pair], results[pair + 1]):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
dist.destroy_process_group()
"""


@sharding
def test_parameters_that_fsdp_has_sharded(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    torchrun(tmp_path / "sharded.py")


def test_a_parameter_of_a_class_of_its_own_takes_the_long_way() -> None:
    class Own(Tensor):
        pass

    p = torch.ones(3).as_subclass(Own).requires_grad_()
    p.grad = torch.ones(3)
    AdamW([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(torch.Tensor(p.detach()), torch.full((3,), 0.9))
    reason = fastlm.ops.explain("adamw", [p], [p.grad], [torch.zeros(3)], [torch.zeros(3)], step=1, lr=0.1).reasons[
        "cpu"
    ]
    assert reason is not None and "is a Own" in reason
