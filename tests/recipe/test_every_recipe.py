"""Every recipe and variant loads, has the values that it was published here with, and builds; one of each kind trains two steps.

Trained are a few recipes that together have every loss, projector, tap, optimizer, number of teachers and family: the next one is always
the recipe that adds most of what the ones before it lack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from deit_kd import recipe as recipes
from deit_kd.models.build import build_models, resolve
from deit_kd.recipe import library
from small_recipes import COMMON, NAMES, one_of_each_kind, reduced

Cli = Callable[..., tuple[int, str]]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
FINGERPRINTS = json.loads((ROOT / "tests/reference/recipe_fingerprints.json").read_text())  # of when each was a file of its own


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
