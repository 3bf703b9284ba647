"""Counts of every recipe at full size, against published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deit_kd import recipe as recipes
from deit_kd.plan import describe, make_plan

# parameters and GMACs: student (method's authors, timm), projector, RegNetY-160 (timm's results table)
PUBLISHED = {
    "deit_ti": (6_633_104, 2.429, 583_632),
    "deit_s": (23_797_520, 5.917, 1_164_240),
    "deit_ti_plain": (5_910_800, 1.261, 583_632),
    "deit_s_plain": (22_436_432, 4.624, 1_164_240),
}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_planned_at_full_size(name: str) -> None:
    recipe = recipes.load(name)
    plan = make_plan(recipe, None)
    if name in PUBLISHED:
        parameters, gmacs, projector = PUBLISHED[name]
        assert (plan.student_parameters, plan.projector_parameters, plan.teacher_parameters) == (parameters, projector, 83_590_140)
        assert plan.student_gmacs == pytest.approx(gmacs, abs=0.002)
        assert plan.teacher_gmacs == pytest.approx(15.91, abs=0.005)
        width = 384 if name.startswith("deit_s") else 192
        line = f"student pooled [B, {width}] -> linear -> [B, 3024] | logsum_correlation | regnety_160.deit_in1k pooled [B, 3024]"
        assert plan.taps == (line,)
        assert ("teacher feature_map", "[B, 3024, 7, 7]") in plan.shapes
    text = describe(recipe, plan, 1_281_167)
    assert recipe.student.name in text
    assert f"{1_281_167 // recipe.global_batch_size * recipe.epochs:,} steps" in text


def test_compute_of_a_run_by_hand() -> None:
    recipe = recipes.load("deit_ti_plain", ["epochs=1", "optim.warmup_epochs=0"])
    plan = make_plan(recipe, 1000)
    # a step is 3 student forwards and 1 teacher forward, 2 operations a multiply-accumulate
    assert plan.training_gflop_per_image == pytest.approx(2 * (3 * 1.261 + 15.912), rel=1e-3)
    assert f"{plan.training_gflop_per_image * 256 * 4 / 1e6:,.3g} PFLOP" in describe(recipe, plan, 1024)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_dry_runs_from_the_command_line(
    name: str, train_cli: Callable[..., tuple[int, str]], photo_folder: Path
) -> None:
    data = [] if name.startswith("quickstart") and name != "quickstart_teacher" else ["--data", photo_folder]
    other = name == "quickstart_teacher" or name.startswith("cifar100")
    overrides = ["data.source=image_folder", "data.num_classes=auto", "data.train_images=auto"] if other else []
    code, printed = train_cli("--recipe", name, "--dry-run", *data, *overrides)
    assert code == 0, printed
    assert "steps over" in printed
