"""Variables of the environment that would move a run's numbers: they agree with the recipe, or the run does not begin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from conftest import SMALL
from deit_kd import recipe as recipes
from deit_kd.distributed.accelerator import environment, make_accelerator, must_agree, on_cpu, plain_accelerator
from deit_kd.errors import UserError

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Accelerate keeps the first accelerator's precision for a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make(tmp_path: Path, *overrides: str) -> object:
    recipe = recipes.load("quickstart_alone", ["optim.clip_grad=1.0", *overrides])
    return make_accelerator(recipe.run, recipe.optim.clip_grad, "cpu", tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--device-batch-size"),
        ("GRADIENT_ACCUMULATION_STEPS", "many", "--device-batch-size"),
        ("MIXED_PRECISION", "bf16", "set run.precision"),
        ("MIXED_PRECISION", "FP16", "set run.precision"),
        ("MIXED_PRECISION", "fp8", "set run.precision"),
        ("GRADIENT_CLIPPING", "0.1", "set optim.clip_grad"),
        ("DYNAMO_BACKEND", "INDUCTOR", "set run.compile"),
        ("DOWNCAST_BF16", "true", "set run.precision"),
        ("USE_DEEPSPEED", "true", "launch/ddp8.yaml"),
        ("USE_MEGATRON_LM", "True", "launch/ddp8.yaml"),
        ("USE_PARALLELISM_CONFIG", "1", "launch/ddp8.yaml"),
        ("TORCH_DEVICE", "cuda:0", "unset it"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(
    name: str, value: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError) as raised:
        make(tmp_path)
    assert f"ACCELERATE_{name}={value!r}" in str(raised.value)
    assert remedy in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_agrees_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` sets always, and values that are the recipe's."""
    launcher = "MIXED_PRECISION=no DYNAMO_BACKEND=NO DYNAMO_MODE=default USE_CPU=False DYNAMO_USE_DYNAMIC=False"
    for setting in f"{launcher} GRADIENT_ACCUMULATION_STEPS=1 GRADIENT_CLIPPING=1.0 USE_DEEPSPEED=false".split():
        monkeypatch.setenv(*f"ACCELERATE_{setting}".split("="))
    make(tmp_path)
    half = recipes.load("quickstart", ["run.precision=bf16", "optim.clip_grad=1"])
    must_agree(half.optim.clip_grad, "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    must_agree(half.optim.clip_grad, "bf16")


def test_no_variable_scales_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> float:
        accelerator = plain_accelerator(cpu=True)
        weight = nn.Parameter(torch.ones(()))
        accelerator.backward(3 * weight)
        assert weight.grad is not None
        return weight.grad.item()

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert gradient() == 3


def test_what_moves_roundings_is_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    assert "moves roundings" not in capsys.readouterr().out
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    make(tmp_path)
    assert "NVIDIA_TF32_OVERRIDE=1, ONEDNN_DEFAULT_FPMATH_MODE=BF16: read, moves roundings" in capsys.readouterr().out
    assert environment() == {"NVIDIA_TF32_OVERRIDE": "1", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}


def test_the_launcher_may_choose_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not on_cpu("auto")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert on_cpu("auto")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU"):
        on_cpu("cuda")


def test_a_run_keeps_what_it_read_and_refuses_what_contradicts(
    train_cli: Cli, fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--recipe", "quickstart_alone", "--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 1, *SMALL]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code, printed = train_cli(*run)
    assert code == 2
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4' is set" in printed
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    code, printed = train_cli(*run)
    assert code == 0, printed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["environment"] == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_processes_wait_long_and_send_no_running_statistics() -> None:
    """NCCL's own ten minutes are less than a download takes; DDP's own buffers are sent in each forward, contrastive memories too."""
    accelerator = plain_accelerator(cpu=True)
    assert accelerator.init_handler.timeout == timedelta(hours=2)
    assert not accelerator.ddp_handler.broadcast_buffers
    assert accelerator.ddp_handler.gradient_as_bucket_view
