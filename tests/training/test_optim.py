"""Learning rates, batches and what goes with them, against the values of the authors' releases, written out here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import nn

from conftest import ROOT, SMALL
from deit_kd import recipe as recipes
from deit_kd.recipe.library import SHORT_NAMES
from deit_kd.training.optim import build_optimizer, build_schedule
from sections import optimizing, scheduling

Cli = Callable[..., tuple[int, str]]
STEPS = 100  # an epoch


class Rates(NamedTuple):
    """Of a release, as its optimizer sees them."""

    batch: int
    peak: float
    start: float  # of the first update
    final: float
    warmup_epochs: int
    clip: float | None


SRD = Rates(256, 2.5e-4, 2.5e-7, 2.5e-6, 20, 15.0)  # deit/config.py: 5e-4, 5e-7, 5e-6 at 512
VKD = Rates(512, 5e-4, 5e-4, 5e-6, 0, None)  # train.py: fixed, no warm-up
DEIT = Rates(1024, 1e-3, 1e-6, 1e-5, 5, None)  # main.py scales lr alone
CO_ADVISE = Rates(1024, 1e-3, 1e-6, 1e-5, 20, 15.0)  # config.py: 5e-4, 5e-7, 5e-6, all doubled
NKD = Rates(1024, 1e-3, 1e-6, 1e-5, 20, 5.0)  # imagenet_bs1024_adamw_swin.py
ND = Rates(2048, 8e-4, 0.0, 1e-6, 20, None)  # 1e-4 at 256
PUBLISHED = {
    **dict.fromkeys(("deit_ti", "deit_s", "deit_ti_plain", "deit_s_plain"), SRD),
    **dict.fromkeys(("deit_ti_vkd", "deit_s_vkd"), VKD),
    **dict.fromkeys(("deit_ti_hard", "deit_s_hard", "deit_ti_soft", "deit_s_soft", "deit_ti_cskd", "deit_ti_two_stages"), DEIT),
    "deit_s_cskd": DEIT._replace(batch=512, peak=5e-4),  # CSKD/configs/cskd_small.py
    "deit_ti_funmatch": DEIT._replace(clip=1.0),  # its optimizer is DeiT's, its clipping the paper's
    **dict.fromkeys(("deit_ti_two_teachers", "deit_s_two_teachers"), CO_ADVISE),
    **dict.fromkeys(("deit_ti_nkd", "deit_s_nkd"), NKD),
    **dict.fromkeys(("deit_b_nd", "deit_s_nd", "deit_ti_nd"), ND),
}
# Steps down by ten: (batch, rate, epochs of the steps).
CIFAR, CIFAR_LOW = (64, 0.05, (150, 180, 210)), (64, 0.01, (150, 180, 210))
CIFAR_ND, CIFAR_ND_LOW = (128, 0.1, (150, 180, 210)), (128, 0.02, (150, 180, 210))
IMAGENET_ND = (512, 0.2, (30, 60, 90))
STEPPED = {
    **{f"cifar100_{name}": CIFAR for name in ("teacher", "kd", "dkd", "dist", "fitnet", "at", "cc", "crd", "reviewkd")},
    **{f"cifar100_logsum:resnet32x4_resnet8x4{loss}": CIFAR for loss in ("", "_dkd")},
    **{f"cifar100_logsum:resnet50_mobilenetv2{loss}": CIFAR_LOW for loss in ("", "_dkd")},
    **{
        name: CIFAR_ND_LOW if "mobilenet" in name or "shufflenet" in name else CIFAR_ND
        for name in recipes.names()
        if name.startswith("cifar100_nd:")
    },
    "imagenet_logsum": (256, 0.1, (30, 60, 90)),
    **{name: IMAGENET_ND for name in recipes.names() if name.startswith("imagenet_nd:")},
}


def test_every_recipe_of_a_release_is_here() -> None:
    own = ("quickstart", "finetune")
    released = {name for name in recipes.names() if not name.startswith(own)}
    assert released == {SHORT_NAMES.get(name, name) for name in (*PUBLISHED, *STEPPED)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_cosine(name: str) -> None:
    published, recipe = PUBLISHED[name], recipes.load(name)
    rate = build_schedule(*scheduling(recipe), STEPS)
    total = 300 * STEPS
    warm = published.warmup_epochs * STEPS
    middle = published.final + (published.peak - published.final) / 2
    assert recipe.global_batch_size == published.batch
    assert (rate.total_steps, rate.warmup_steps, recipe.optim.clip_grad) == (total, warm, published.clip)
    expected = {"peak": published.peak, "start": published.start, "final": published.final, "middle": middle}
    found = {"peak": rate.peak_lr, "start": rate(0), "final": rate(total), "middle": rate(total // 2)}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", STEPPED)
def test_steps_down(name: str) -> None:
    recipe = recipes.load(name)
    batch, peak, epochs = STEPPED[name]
    rate = build_schedule(*scheduling(recipe), STEPS)
    assert recipe.global_batch_size == batch
    for number, epoch in enumerate(epochs):
        assert rate(epoch * STEPS - 1) == pytest.approx(peak * 0.1**number, rel=1e-6)
        assert rate(epoch * STEPS) == pytest.approx(peak * 0.1 ** (number + 1), rel=1e-6)
    assert rate(0) == pytest.approx(peak, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith(("cifar100", "imagenet"))])
def test_cnns_are_trained_in_float32(name: str) -> None:
    assert recipes.load(name).run.precision == "no"


def test_what_else_follows_the_releases() -> None:
    for size in ("ti", "s"):
        nkd, two = recipes.load(f"deit_{size}_nkd"), recipes.load(f"deit_{size}_two_teachers")
        assert (nkd.augmentation.mixup, nkd.augmentation.cutmix, nkd.student.drop_path) == (0, 0, 0)
        assert two.student.drop_path == 0
    assert recipes.load("imagenet_resnet50_mobilenetv1_kdpp").student.model_args == {"act_layer": "relu"}


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 5, 4))
        self.head, self.norm = nn.Linear(4, 2), nn.LayerNorm(4)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.projectors = Student(), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)])

    def no_weight_decay(self) -> set[str]:
        return {"student.cls_token", "student.pos_embed", "projectors.1.weight"}  # the last is constrained


@pytest.mark.parametrize(
    ("decay", "more"),
    [
        ("matrices", set[str]()),
        ("matrices_and_tokens", {"student.cls_token", "student.pos_embed"}),
        ("all", {"student.head.bias", "student.norm.weight", "student.norm.bias", "projectors.0.bias"}),
    ],
)
def test_what_decays(decay: str, more: set[str]) -> None:
    """DeiT++ of ND decays tokens and position embedding, DeiT does not; a constrained projector never does. `all` is for CNNs, which list nothing."""
    module = Module()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(*optimizing(recipes.load("deit_ti_nd", [f"optim.weight_decay_on={decay}"])), module)
    decayed = {names[id(each)] for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}
    assert decayed == {"student.head.weight", "projectors.0.weight"} | more
    assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.0, 0.3}
    assert recipes.load("deit_b_nd").optim.weight_decay_on == "matrices_and_tokens"


def test_a_run_of_before_keeps_its_rates(tmp_path: Path) -> None:
    """Its recipe.yaml lacks the key: all three rates are scaled as they were, its checkpoints fit it, and the recipe of today differs."""
    stored = yaml.safe_load((ROOT / "recipes/imagenet_deit/deit_hard.yaml").read_text())
    del stored["optim"]["lr_rule_scales"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    old = recipes.load(tmp_path)
    rate = build_schedule(*scheduling(old), STEPS)
    assert (rate.peak_lr, rate(0), rate(300 * STEPS)) == pytest.approx((1e-3, 2e-6, 2e-5), rel=1e-9)
    progress = 0.5 * (1 + math.cos(math.pi * 290 / 300))
    assert rate(290 * STEPS) == pytest.approx(2e-5 + (1e-3 - 2e-5) * progress, rel=1e-9)
    assert recipes.differences(old, recipes.load("deit_ti_hard")) == ["optim.lr_rule_scales: all -> lr"]
    again = recipes.load(tmp_path, [])
    assert recipes.differences(old, again) == []


def test_a_run_of_before_goes_on_at_its_rates(train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    """By its own recipe it continues; by one that scales otherwise it is refused by name."""
    rates = ["optim.lr_rule=linear", "optim.lr_base_batch_size=12", "optim.warmup_epochs=1", "optim.warmup_lr=1.0e-4"]
    run, output = ["--data", fashion_folder, "--output", tmp_path / "run"], tmp_path / "run"
    stored = yaml.safe_load(recipes.dump(recipes.load("quickstart_alone", [*SMALL, *rates, "run.log_every_steps=1"])))
    del stored["optim"]["lr_rule_scales"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(stored))
    code, printed = train_cli("--recipe", tmp_path / "old.yaml", *run, "--max-steps", 1)
    assert code == 0, printed
    code, printed = train_cli("--recipe", tmp_path / "old.yaml", *run, "--max-steps", 2, "optim.lr_rule_scales=lr")
    assert code == 2
    assert "optim.lr_rule_scales" in printed
    code, printed = train_cli("--recipe", output, *run, "--max-steps", 2)
    assert code == 0, printed
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, second = (line["lr"] for line in lines if line["kind"] == "train")
    assert first == pytest.approx(2e-4)  # twice 1e-4, as the rule of before has it
    assert second > first


def test_a_key_of_later_does_not_change_the_mark_of_a_checkpoint() -> None:
    """The mark of the quick start, as the version before this key made it."""
    assert recipes.fingerprint(recipes.load("quickstart")) == BEFORE
    assert recipes.fingerprint(recipes.load("quickstart", ["optim.lr_rule_scales=lr"])) != BEFORE


BEFORE = "ae140de9e3f7debeff5c7acc104031eeb44513b4caf6d36795123dd0b771de1a"


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_a_skipped_first_step_leaves_momentum_at_zero(name: str) -> None:
    """As a GPU skips it: the kernel reads `found_inf`. torch allocates momentum without a value, and would use what lay there."""
    after = []
    for skips in (True, False):
        torch.manual_seed(0)
        module = Module()
        recipe = recipes.load("cifar100_kd", [f"optim.name={name}"])
        optimizer: Any = build_optimizer(*optimizing(recipe), module)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        if skips:
            before = [parameter.detach().clone() for parameter in module.parameters()]
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            del optimizer.found_inf
            assert all(map(torch.equal, before, module.parameters()))
            assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
        for _ in range(2):
            optimizer.step()
        after.append([parameter.detach() for parameter in module.parameters()])
    assert all(map(torch.equal, *after))
