"""Every recipe trains two steps on real images, at a size that fits a test; overrides that headers name are recipes too."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from deit_kd import recipe as recipes

Cli = Callable[..., tuple[int, str]]
COMMON = [
    "data.source=image_folder",
    "data.num_classes=auto",
    "data.train_images=auto",
    "data.img_size=32",
    "global_batch_size=8",
    "run.workers=0",
    "run.log_every_steps=1",
]
SMALL_DEIT = ["student.model_args={patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}"]
SMALL_REGNET = ["name=regnety_002", "weights=random"]


def reduced(name: str) -> list[str]:
    """Overrides that leave the method as it is and take its size away."""
    if name.startswith("finetune"):
        return ["data.img_size=28", *(["teacher.weights=random", "teacher.name=regnety_002"] if name == "finetune_taught" else [])]
    if name.startswith("quickstart"):
        return ["data.img_size=28", *(["teacher.weights=random"] if name == "quickstart" else [])]
    if name == "cifar100_teacher":
        return []
    if name.endswith("two_teachers"):  # a Swin takes images of its own size
        return [*SMALL_DEIT, *(f"teachers.0.{key}" for key in SMALL_REGNET), "teachers.1.weights=random", "teachers.1.img_size=224"]
    if not name.startswith("deit"):
        memory = ["projector.negatives=64"] if name.endswith("_crd") else []
        return ["teacher.weights=random", *memory]
    if "nkd" in name:
        return [*SMALL_DEIT, "teacher.name=deit3_small_patch16_224", "teacher.weights=random", "teacher.img_size=224"]
    return [*SMALL_DEIT, *(f"teacher.{key}" for key in SMALL_REGNET)]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_trains_two_steps(name: str, train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
    options = ["--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 2]
    code, printed = train_cli("--recipe", name, *options, *COMMON, *reduced(name))
    assert code == 0, printed
    recipe = recipes.load(tmp_path / "run" / "recipe.yaml")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    expected = {"ce"} if recipe.label_weight else set()
    several = len(recipe.distillations()) > 1
    for number, distillation in enumerate(recipe.distillations()):
        suffix = f"_{number}" if several else ""
        expected |= {f"kd{suffix}"} if distillation.distill.kd_weight else set()
        expected |= {f"feature{suffix}"} if distillation.distill.feature_weight else set()
    assert {key for key in trained[0] if re.fullmatch(r"(ce|kd|feature)(_\d)?", key)} == expected
    assert len(trained) == 2
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    for distillation in recipe.distillations():
        assert distillation.teacher.name in card


def header(name: str) -> str:
    return (ROOT / "recipes" / f"{name}.yaml").read_text().split("\nseed:")[0]


@pytest.mark.parametrize("name", [name for name in recipes.names() if "DKD++:" in header(name)])
def test_variants_that_a_header_names_are_recipes(name: str) -> None:
    text = re.sub(r"\n#\s+(?=distill\.)", " ", header(name))
    for method, loss in (("DKD++", "decoupled_distillation"), ("DIST++", "dist")):
        found = re.search(rf"(?<!K){re.escape(method)}: (distill\..*)", text)
        assert found, method
        recipe = recipes.load(name, shlex.split(found[1]))
        assert recipe.distill is not None
        assert recipe.distill.kd_loss == loss
        assert recipe.distill.feature_weight > 0


@pytest.mark.parametrize("name", recipes.names())
def test_every_header_says_what_is_published_and_by_whom(name: str) -> None:
    text = header(name)
    for word in ("Command", *(() if name.startswith("quickstart") else ("Hardware", "Expected"))):
        assert word in text, word
    assert f"--recipe {name}" in text
    if name.startswith("quickstart"):
        return
    expected = text.split("Expected")[1]
    if re.search(r"\d\d\.\d", expected):
        assert "not reproduced here" in re.sub(r"\n#\s+", " ", expected)
