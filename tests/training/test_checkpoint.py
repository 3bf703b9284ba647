"""Checkpoints: whole or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch

from deit_kd.errors import UserError
from deit_kd.training import checkpoint

PARTS = {
    "module": {"a": torch.arange(6.0).view(2, 3), "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
}


def test_round_trip_and_pruning_after_the_save(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, PARTS, {"note": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000030"]
    newest = checkpoint.newest(tmp_path, print)
    assert newest is not None
    parts, state = checkpoint.load(newest)
    assert (state["step"], state["note"]) == (30, 30)
    for name, value in PARTS["module"].items():
        assert torch.equal(parts["module"][name], value)
    assert {file.suffix for file in newest.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state", "other step"])
def test_damaged_checkpoints_are_named_and_passed_over(damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, PARTS, {}, keep=5)
    file = path / ("state.json" if "st" in damage.split()[-1] else "module.safetensors")
    content = file.read_bytes()
    if damage == "other step":  # one bit
        file.write_bytes(content.replace(b'"step": 2', b'"step": 0'))
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage != "flipped" else content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert str(path) in said[0]
    with pytest.raises(UserError, match="give another checkpoint"):
        checkpoint.load(path)


def test_one_of_another_recipe_is_named_and_passed_over(tmp_path: Path) -> None:
    for step, recipe in ((1, "ours"), (2, "theirs")):
        checkpoint.save(tmp_path, step, PARTS, {"recipe": recipe}, keep=5)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append, "ours") == tmp_path / "step_00000001"
    assert said == [f"{tmp_path / 'step_00000002'}: is of another recipe; trying the one before it"]


def test_a_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, PARTS, {}, keep=1)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, PARTS, {"cannot be JSON": object()}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize(
    "build", [torch.optim.AdamW, timm.optim.Lamb, timm.optim.Adan]
)  # LAMB keeps a tensor in its groups, Adan a number
def test_optimizer_state_survives_as_tensors(build: Callable[..., torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = build(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    json.dumps(rest)
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    other = build(model.parameters(), lr=0.1)
    other.param_groups[0]["lr"] = 0.5
    checkpoint.unpack_optimizer(other, tensors, rest)
    same_state(other.state_dict(), optimizer.state_dict())


def same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal in all but the order of settings."""
    for each in (a, b):
        each["param_groups"] = [dict(sorted(group.items())) for group in each["param_groups"]]
    assert str(a) == str(b)


SETTINGS = {
    "amsgrad": True,
    "differentiable": True,
    "maximize": True,
    "capturable": True,
    "weight_decay": -5,
    "betas": [1.5, 2],
    "eps": -1,
    "lr": None,  # these two are taken out
    "fused": None,
    "nesterov": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_optimizer_are_those_with_which_it_was_built(name: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    right = copy.deepcopy(optimizer.state_dict())
    if SETTINGS[name] is None:
        del rest["param_groups"][0][name]
    else:
        rest["param_groups"][0][name] = SETTINGS[name]
    checkpoint.unpack_optimizer(optimizer, tensors, rest)
    same_state(optimizer.state_dict(), right)
    optimizer.step()


@pytest.mark.parametrize("value", ["fast", -1.0, float("nan"), None, [1.0]])
@pytest.mark.parametrize("name", ["lr", "step"])
def test_what_training_changes_in_an_optimizer_is_one_number(name: str, value: Any) -> None:
    optimizer = timm.optim.Lamb(torch.nn.Linear(3, 2).parameters(), lr=0.1)
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    rest["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=f"optimizer: {name} is "):
        checkpoint.unpack_optimizer(optimizer, tensors, rest)


def test_moments_of_other_parameters_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    rest["param_groups"][0]["params"] = [1, 0]
    with pytest.raises(ValueError, match="a group is of other parameters"):
        checkpoint.unpack_optimizer(optimizer, tensors, rest)
