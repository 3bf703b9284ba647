"""The door: what is accepted, what is refused, and how."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from conftest import ROOT
from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.recipe import Recipe, RecipeError
from programs import run_script

NAMES = recipes.names()


def test_there_are_recipes() -> None:
    expected = {"deit_logsum:tiny", "deit_logsum:small", "deit_vkd:tiny", "quickstart:distilled", "quickstart_teacher"}
    assert expected <= set(NAMES)
    assert {name.partition(":")[0] for name in NAMES} == {file.stem for file in (ROOT / "recipes").rglob("*.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_states_every_key_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    (tmp_path / "copy.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "copy.yaml") == recipe


def test_the_baseline_differs_from_the_quick_start_by_its_teacher_alone() -> None:
    changed = {
        line.split(":")[0].split(".")[0]
        for line in recipes.differences(recipes.load("quickstart"), recipes.load("quickstart_alone"))
    }
    assert changed == {"teacher", "projector", "distill"}


def test_numbers_that_yaml_reads_as_strings_are_numbers() -> None:
    assert recipes.load("quickstart", ["optim.lr=5e-4", "seed=012"]).optim.lr == 5e-4


def test_all_faults_come_at_once_with_key_value_and_nearest_name() -> None:
    with pytest.raises(RecipeError) as raised:
        recipes.load(
            "quickstart",
            ["optim.lrr=3", "epochs=3.5", "optim.lr=fast", "data.img_size=30", "run.precision=fp8", "distill.power=0", "oops"],
        )
    message = str(raised.value)
    assert "7 faults" in message
    for part in (
        "optim.lrr: unknown key in an override (did you mean optim.lr",
        "epochs: must be an integer, got 3.5",
        "optim.lr: must be a number, got 'fast'",
        "data.img_size: 30 is not divisible by the patch size 7",
        "run.precision: must be 'auto', 'no', 'bf16' or 'fp16', got 'fp8'",
        "distill.power: must be at least 1, got 0",
        "'oops' is not an override; write key=value",
    ):
        assert part in message, message


def test_unknown_and_missing_keys_in_a_file(tmp_path: Path) -> None:
    text = (ROOT / "recipes/quickstart/quickstart.yaml").read_text().replace("  weight_decay:", "  weight_decai:")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"optim.weight_decai: unknown key \(did you mean optim.weight_decay") as raised:
        recipes.load(tmp_path / "mine.yaml")
    assert "optim.weight_decay: missing" in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["teacher=null"], "teacher: null, but teacher, projector and distill go together"),
        (["distill.kd_weight=0", "distill.feature_weight=0"], "the teacher does nothing"),
        (["optim.warmup_epochs=99"], "leaves nothing of epochs"),
        (["augmentation.auto_augment=rand-m9", "augmentation.color_jitter=0.4"], "has no effect beside auto_augment=rand-m9"),
        (["student.model_args.img_size=28"], "state it as data.img_size"),
        (["augmentation.crop_scale=[0.5, 0.1]"], "needs 0 < low <= high <= 1"),
        (["global_batch_size=0"], "global_batch_size: must be at least 1, got 0"),
        (
            ["run.compile=maybe"],
            "1 fault\n  run.compile: must be true or false or 'auto', 'reduce-overhead' or 'max-autotune', got 'maybe'",
        ),
        (["ema_decay=1.5"], "ema_decay: must be below 1, or null, got 1.5"),
        (["teacher=null", "teacher.name=x"], "cannot be set, because teacher is null"),
    ],
)
def test_impossible_values_are_refused(overrides: list[str], fault: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipes.load("quickstart", overrides)
    assert fault in str(raised.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'quikstart' \(did you mean quickstart"):
        recipes.load("quikstart")
    with pytest.raises(RecipeError, match="does not exist"):
        recipes.load(tmp_path / "none.yaml")
    for text, fault in (("a: [", "not valid YAML"), ("- 1", "a recipe is a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=fault):
            recipes.load(tmp_path / "bad.yaml")


def test_help_and_typos_import_no_torch() -> None:
    probe = "import sys; sys.argv = ['train.py', *{}]\ntry:\n import train; train.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'timm' not in sys.modules"
    for arguments in (["--help"], ["--recipe", "quikstart"], ["--recipe", "quickstart", "lr=3"]):
        done = run_script("-c", probe.format(arguments))
        assert done.returncode == 0, done.stderr


def test_every_key_is_read_somewhere() -> None:
    """A key that no code reads would be a flag that does nothing."""
    parameters = {
        key
        for term in ("kd", "feature")
        for name, keys in recipes.keys_read(f"distill.{term}_loss").items()
        for key in keys
        if key in inspect.signature(getattr(losses, name)).parameters
    }
    assert parameters == {  # all that a loss reads beside head and taps
        "temperature",
        "target_weight",
        "nontarget_weight",
        "inter_weight",
        "intra_weight",
        "gamma",
        "power",
        "normalization",
        "class_means",
    }
    read = parameters | {
        node.attr
        for file in [*(ROOT / "deit_kd").rglob("*.py"), ROOT / "train.py"]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    keys = {f.name for cls in (Recipe, *recipes.Section.__subclasses__()) for f in dataclasses.fields(cls)}
    assert len(keys) > 60
    assert keys - read <= {"eps"}, keys - read  # build_optimizer passes it by name


@pytest.mark.parametrize(
    ("policy", "unread"),
    [
        ("rand-m9-foo", "foo"),
        ("rand-m9-mstd-inc1", "mstd"),
        ("rand-m9-", "''"),
        ("original-x", "x"),
        ("augmix-m5-wide", "wide"),
        ("3a-t", "t"),
    ],
)
def test_sections_of_an_augmentation_that_timm_passes_over_are_refused(policy: str, unread: str) -> None:
    with pytest.raises(RecipeError, match=f"timm does not read {unread} of {policy}; remove it"):
        recipes.load("quickstart", [f"augmentation.auto_augment={policy}"])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-tweights", "original-mstd0.5", "augmix-m5-w4-d2", "3a"])
def test_sections_of_an_augmentation_that_timm_reads(policy: str) -> None:
    assert recipes.load("quickstart", [f"augmentation.auto_augment={policy}"]).augmentation.auto_augment == policy


@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        (["epochs=-1"], ["epochs: must be at least 1, got -1"]),
        (["epochs=0", "distill.active_epochs={kd: [0, 3]}"], ["epochs: must be at least 1, got 0"]),
        (["data.img_size=-1"], ["data.img_size: must be at least 1, got -1"]),
        (["optim.warmup_epochs=-1", "epochs=-2"], ["epochs: must be", "optim.warmup_epochs: must be"]),
    ],
)
def test_what_follows_from_a_fault_is_no_fault_of_its_own(overrides: list[str], faults: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        recipes.load("quickstart", overrides)
    lines = [line.strip() for line in str(raised.value).splitlines()[1:]]
    assert len(lines) == len(faults)
    assert all(any(line.startswith(fault) for line in lines) for fault in faults)
