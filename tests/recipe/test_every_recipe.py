"""Every recipe and variant loads, has the values that it was published here with, and builds; one of each kind trains two steps.

Trained are a few recipes that together have every loss, projector, tap, optimizer, number of teachers and family: the next one is always
the recipe that adds most of what the ones before it lack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from deit_kd import recipe as recipes
from deit_kd.models.build import build_models, resolve
from deit_kd.recipe import library

Cli = Callable[..., tuple[int, str]]
NAMES = recipes.names()
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
FINGERPRINTS = json.loads((ROOT / "tests/reference/recipe_fingerprints.json").read_text())  # of when each was a file of its own
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
        return ["data.img_size=28", *(["teacher.weights=random", "teacher.name=regnety_002"] if name == "finetune:taught" else [])]
    if name.startswith("quickstart"):
        return ["data.img_size=28", *(["teacher.weights=random"] if name == "quickstart:distilled" else [])]
    if name == "cifar100_teacher":
        return []
    if name.startswith("deit_two_teachers"):  # a Swin takes images of its own size
        small = ["teachers.1.name=swin_tiny_patch4_window7_224", "teachers.1.weights=random", "teachers.1.img_size=224"]
        return [*SMALL_DEIT, *(f"teachers.0.{key}" for key in SMALL_REGNET), *small]
    if not name.startswith("deit"):
        memory = ["projector.negatives=64"] if name == "cifar100_crd" else []
        return ["teacher.weights=random", *memory]
    if name.startswith("deit_nkd"):
        return [*SMALL_DEIT, "teacher.name=deit3_small_patch16_224", "teacher.weights=random", "teacher.img_size=224"]
    return [*SMALL_DEIT, *(f"teacher.{key}" for key in SMALL_REGNET)]


def parts(name: str) -> set[Any]:
    """What a recipe is made of."""
    recipe, family = recipes.load(name), recipes.find(name)[0].parent.name
    found: set[Any] = {family, recipe.optim.name, len(recipe.distillations())}
    for distillation in recipe.distillations():
        distill, projector = distillation.distill, f"projector {distillation.projector.kind}"
        taps = {f"tap {'number' if isinstance(tap, int) else tap}" for tap in (distill.student_tap, distill.teacher_tap)}
        found |= {distill.kd_loss, distill.feature_loss, projector, *taps}
    return found


def one_of_each_kind() -> list[str]:
    every = {name: parts(name) for name in NAMES}
    lacking: set[Any] = set().union(*every.values())
    chosen = []
    while lacking:
        chosen.append(max(every, key=lambda name: len(every[name] & lacking)))
        lacking -= every[chosen[-1]]
    return chosen


@pytest.mark.parametrize("name", one_of_each_kind())
@pytest.mark.slow
def test_one_recipe_of_each_kind_trains_two_steps(name: str, train_cli: Cli, fashion_folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds_at_full_size(name: str) -> None:
    recipe = resolve(recipes.load(name))
    _, teachers, distiller = build_models(recipe, None)
    assert len(teachers) == len(distiller.projectors) == len(recipe.distillations())
    assert all(parameter.is_meta for parameter in distiller.parameters())


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_no_recipe_has_changed(name: str) -> None:
    assert recipes.fingerprint(recipes.load(name)).startswith(FINGERPRINTS[name])


def test_every_name_of_before_is_a_name() -> None:
    before = {name for name in FINGERPRINTS if ":" not in name}
    assert before == set(library.SHORT_NAMES) | (before & set(NAMES)) | {"quickstart", "finetune"}
    assert set(library.SHORT_NAMES.values()) <= set(NAMES), "each means one recipe that there is"
    assert {recipes.fingerprint(recipes.load(name))[:16] for name in NAMES} == set(FINGERPRINTS.values())


def header(file: Path) -> str:
    return file.read_text().split("\nseed:")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_header_says_what_is_published_and_by_whom(file: Path) -> None:
    text, quick = header(file), file.stem.startswith("quickstart")
    assert text.startswith("# "), "a recipe begins with what it is"
    for word in ("Command", *(() if quick else ("Hardware", "Expected"))):
        assert word in text, word
    assert f"--recipe {file.stem}" in text
    if quick:
        return
    expected = re.sub(r"\n#\s+", " ", text.split("Expected")[1])
    published = re.findall(r"\d\d\.\d+ %", "".join(line for name, line in recipes.listing() if name.startswith(f"{file.stem}:")))
    if published or re.search(r"\d\d\.\d", expected):
        assert "not reproduced here" in expected
    if "stand with them below" not in expected:
        for number in published:
            assert number.removesuffix(" %") in expected, f"a variant says {number}, the header does not"


@pytest.mark.parametrize("file", [file for file in FILES if "\nvariants:" in file.read_text()], ids=lambda file: file.stem)
def test_variants_say_how_they_differ(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    assert list(document)[-1] == "variants"
    variants = document["variants"]
    assert [name for name, _ in recipes.listing() if name.startswith(f"{file.stem}:")] == [
        f"{file.stem}:{name}" for name in variants
    ]
    assert list(next(iter(variants.values()))) == ["description"], "the first is the file as it stands"
    own = dict(recipes.flatten(recipes.load(file.stem)))
    for name, keys in variants.items():
        values = dict(recipes.flatten(recipes.load(f"{file.stem}:{name}")))
        for key in set(keys) - {"description"}:
            assert own.get(key, own) != values.get(key, values), f"{name}: {key} is that of the file"


def test_the_table_has_every_recipe() -> None:
    table = (ROOT / "recipes/README.md").read_text()
    assert [file.stem for file in FILES if f"`{file.stem}`" not in table] == []
    for variant in {name.partition(":")[2] for name in NAMES} - {"", "distilled"}:
        assert f"`{variant}`" in table or f":{variant}`" in table or variant.endswith(("_dkd", "_dist")), variant
