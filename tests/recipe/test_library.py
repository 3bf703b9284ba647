"""Names, variants and paths of recipes, and where their runs are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from deit_kd import recipe as recipes
from deit_kd.recipe import RecipeError

Cli = Callable[..., tuple[int, str]]
QUICKSTART = (ROOT / "recipes/quickstart/quickstart.yaml").read_text().partition("\nvariants:")[0]


def mine(folder: Path, variants: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(f"{QUICKSTART}\nvariants:{variants}")
    return file


def test_a_variant_differs_in_its_keys_alone() -> None:
    tiny, small = recipes.load("deit_vkd:tiny"), recipes.load("deit_vkd:small")
    assert recipes.load("deit_vkd") == tiny == recipes.load("deit_ti_vkd")
    assert recipes.differences(tiny, small) == [
        "student.name: deit_tiny_convstem_distilled_patch16_224 -> deit_small_convstem_distilled_patch16_224"
    ]


def test_paths_of_before_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert recipes.load("recipes/deit_s_vkd.yaml") == recipes.load("deit_vkd:small")
    assert recipes.load(ROOT / "recipes/quickstart.yaml") == recipes.load("quickstart")
    with pytest.raises(RecipeError, match=r"recipe file recipes/nothing.yaml does not exist"):
        recipes.load("recipes/nothing.yaml")


def test_overrides_come_after_the_variant() -> None:
    assert recipes.load("deit_cskd:small").global_batch_size == 512
    assert recipes.load("deit_cskd:small", ["global_batch_size=64"]).global_batch_size == 64


def test_a_variant_of_a_file_is_read_as_the_types_of_its_keys_ask(tmp_path: Path) -> None:
    file = mine(
        tmp_path,
        """
  other:
    run.precision: no
    student.name: 010
    optim.lr: 1e-3
    optim.betas: [0.9, 0.95]
    student.model_args.depth: 2
    distill.kd_loss: null
    distill.kd_weight: 0
""",
    )
    recipe = recipes.load(f"{file}:other")
    assert (recipe.run.precision, recipe.student.name, recipe.optim.lr, recipe.optim.betas) == ("no", "010", 1e-3, (0.9, 0.95))
    assert (recipe.student.model_args["depth"], recipe.student.model_args["embed_dim"]) == (2, 96)
    assert recipe.distill is not None
    assert recipe.distill.temperature is None, "a loss that is off reads no temperature"
    assert recipes.load(file) == recipes.load("quickstart"), "the file itself"
    (tmp_path / "copy.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "copy.yaml") == recipe
    assert "variants" not in yaml.safe_load(recipes.dump(recipe))


@pytest.mark.parametrize(
    ("variants", "asked", "message"),
    [
        (" 3", "x", "variants: must map a name to the keys that differ, such as small: {epochs: 10}"),
        ("\n  x: 3", "x", "variants: must map a name to the keys that differ"),
        ("\n  x: {}\n  y: {}", "z", "no variant is called 'z'; it has x, y"),
        ("", "z", "no variant is called 'z'; it has none"),
        ("\n  x: {optim.lrr: 1}", "x", "1 fault\n  variants.x: optim.lrr: unknown key"),
        ("\n  x: {optim.lr: fast}", "x", "1 fault\n  optim.lr: must be a number, got 'fast'"),
        ("\n  x: {}\n  x: {}", "x", "'x' stands on line"),
    ],
)
def test_faults_of_variants(tmp_path: Path, variants: str, asked: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipes.load(f"{mine(tmp_path, variants)}:{asked}")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deit_vkd:big", "deit_vkd.yaml: no variant is called 'big'; it has tiny, small"),
        ("quickstart_teacher:x", "no variant is called 'x'; it has none"),
        ("deit_vkd:", "no variant is called ''"),
        ("deit_ti:small", "deit_ti:small: deit_ti is deit_logsum:tiny already; a variant follows the name of a file"),
        ("deit_vkdd:small", "unknown recipe 'deit_vkdd:small' (did you mean deit_vkd:small"),
        ("deit_s_vkdd", "unknown recipe 'deit_s_vkdd' (did you mean deit_s_vkd"),
        ("none.yaml:small", "recipe file none.yaml:small does not exist"),
        ("", "unknown recipe '.'"),
        (":", "unknown recipe ':'"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as raised:
        recipes.load(name)
    assert message in str(raised.value)
    assert message.startswith("unknown") or "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("deit_ti", "deit_ti"),
        ("deit_s_vkd", "deit_s_vkd"),
        ("deit_vkd", "deit_vkd"),
        ("deit_vkd:small", "deit_vkd_small"),
        ("cifar100_kd", "cifar100_kd"),
        ("cifar100_resnet32x4_resnet8x4_kd", "cifar100_resnet32x4_resnet8x4_kd"),
        (f"{ROOT}/recipes/imagenet_deit/deit_vkd.yaml:small", "deit_vkd_small"),
        ("my/own.yaml", "own"),
        (f"{ROOT}/recipes/deit_ti.yaml", "deit_ti"),
        ("nothing", "nothing"),
    ],
)
def test_the_folder_of_a_run(name: str, folder: str) -> None:
    assert recipes.run_folder(name) == Path("runs") / folder


def test_a_run_of_a_variant_keeps_the_complete_recipe_of_that_variant(
    train_cli: Cli, fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["data.source=image_folder", "global_batch_size=24", "run.workers=0", "student.model_args.depth=1", "--max-steps", "1"]
    code, printed = train_cli("--recipe", "quickstart:alone", "--data", fashion_folder, *small)
    assert code == 0, printed
    assert yaml.safe_load(Path("runs/quickstart_alone/recipe.yaml").read_text())["teacher"] is None
    assert "variants" not in Path("runs/quickstart_alone/recipe.yaml").read_text()
    code, printed = train_cli("--recipe", "quickstart_alone", "--data", fashion_folder, *small[:-1], "2")
    assert code == 0, printed
    assert "going on from runs/quickstart_alone/checkpoints/step_00000001" in printed, "the name of before has the same folder"


def test_every_name_is_listed_with_a_line(train_cli: Cli) -> None:
    listed = dict(recipes.listing())
    assert set(recipes.names()) <= set(listed)
    assert len(listed) == len(list(recipes.listing()))
    assert listed["deit_logsum:tiny"].endswith("(also deit_ti)")
    assert all(line.strip() for line in listed.values())
    printed = train_cli("--help")[1]
    for name, line in listed.items():
        assert f"{name} " in printed
        assert line in printed
