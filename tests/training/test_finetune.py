"""Going on from trained weights: other classes and sizes, layers that stay or learn slowly, heads, held out images, early stops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

import deit_kd
from deit_kd import recipe as recipes
from deit_kd.data import open_source
from deit_kd.data.sources.base import split_holdout
from deit_kd.errors import UserError
from deit_kd.models.build import build_distiller, resolve
from deit_kd.training.metrics import read_metrics
from deit_kd.training.optim import build_optimizer
from programs import run_script
from sections import optimizing

Cli = Callable[..., tuple[int, str]]
SMALL = ["data.img_size=28", "global_batch_size=24", "run.workers=0", "run.log_every_steps=1", "epochs=3", "optim.warmup_epochs=1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small distilled student of five classes at 42 px."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("trained") / "student"
    arguments = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}
    student = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=42, **arguments)
    save_for_hf(student, folder, model_args=arguments, safe_serialization=True)
    return folder


def changes(weights: Path, run: Path) -> tuple[set[str], dict[str, Tensor]]:
    """(names of tensors that training changed, all of the run's)"""
    before, after = load_file(weights / "model.safetensors"), load_file(run / "student/model.safetensors")
    assert before.keys() == after.keys()
    return {key for key in after if after[key].shape != before[key].shape or not torch.equal(after[key], before[key])}, after


def test_other_classes_and_size(weights: Path, fashion_folder: Path, train_cli: Cli, tmp_path: Path) -> None:
    code, said = train_cli(
        *("--recipe", "finetune", "--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 2, *SMALL),
        *(f"finetune.weights={weights}", "finetune.frozen=[patch_embed, blocks.0.]"),
    )
    assert code == 0, said
    changed, after = changes(weights, tmp_path / "run")
    assert not any(key.startswith(("patch_embed.", "blocks.0.")) for key in changed)
    assert {"blocks.1.attn.qkv.weight", "pos_embed", "head.weight", "head_dist.weight"} <= changed
    assert after["pos_embed"].shape == (1, 18, 48)
    config = json.loads((tmp_path / "run/student/config.json").read_text())
    assert config["label_names"] == list(open_source("image_folder", fashion_folder, "train").class_names)
    resolved = recipes.load(tmp_path / "run/recipe.yaml")
    assert (resolved.student.name, resolved.student.model_args["depth"]) == ("deit_tiny_distilled_patch16_224", 3)
    card = (tmp_path / "run/student/README.md").read_text()
    assert "Training went on from **.../student**" in card
    assert "patch_embed, blocks.0. stayed as they were" in card
    assert "9 Ankle boot" in card
    for file in (tmp_path / "run/student").iterdir():
        assert str(weights.parent).encode() not in file.read_bytes(), file
    assert deit_kd.load_student(tmp_path / "run")(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
    code, said = train_cli(
        *("--recipe", "finetune", "--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 3, *SMALL),
        *(f"finetune.weights={weights}", "finetune.frozen=[patch_embed, blocks.0.]"),
    )
    assert code == 0, said
    assert "going on from" in said


def test_a_probe_trains_heads_alone(weights: Path, fashion_folder: Path, train_cli: Cli, tmp_path: Path) -> None:
    options = ["--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 3, *SMALL, "data.img_size=42"]
    code, said = train_cli("--recipe", "finetune_probe", *options, f"finetune.weights={weights}")
    assert code == 0, said
    assert changes(weights, tmp_path / "run")[0] == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize(("heads", "used", "unused"), [("class", "head", "head_dist"), ("distillation", "head_dist", "head")])
def test_one_head_alone(
    heads: str, used: str, unused: str, weights: Path, fashion_folder: Path, train_cli: Cli, tmp_path: Path
) -> None:
    options = ["--data", fashion_folder, "--output", tmp_path / "run", "--max-steps", 3, *SMALL]
    code, said = train_cli("--recipe", "finetune", *options, f"finetune.weights={weights}", f"finetune.heads={heads}")
    assert code == 0, said
    student = deit_kd.load_student(tmp_path / "run")
    assert not student.get_parameter(f"{unused}.weight").any()
    assert not student.get_parameter(f"{unused}.bias").any()
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        token = student.forward_features(images)[:, 0 if heads == "class" else 1]
        torch.testing.assert_close(student(images), student.get_submodule(used)(token) / 2)


def test_lower_layers_learn_more_slowly(weights: Path) -> None:
    recipe = resolve(recipes.load("finetune", ["data.img_size=42", f"finetune.weights={weights}", "finetune.layer_decay=0.5"]))
    distiller = build_distiller(recipe, 5, [])
    optimizer = build_optimizer(*optimizing(recipe), distiller)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scale = {name: group_of[id(p)]["lr_scale"] for name, p in distiller.named_parameters()}
    assert len(scale) == sum(len(group["params"]) for group in optimizer.param_groups)
    # patches and tokens, three blocks, norm and heads: each half the one above
    chain = ["student.patch_embed.proj.weight", *(f"student.blocks.{n}.mlp.fc1.weight" for n in range(3)), "student.head.weight"]
    assert [scale[name] for name in chain] == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    assert scale["student.pos_embed"] == 0.5**4
    decays = {name: group_of[id(p)]["weight_decay"] for name, p in distiller.named_parameters()}
    assert {name for name, value in decays.items() if not value} == {
        name
        for name, p in distiller.named_parameters()
        if p.ndim <= 1 or name.split(".")[-1] in ("pos_embed", "cls_token", "dist_token")
    }


def test_frozen_batch_norms_keep_their_statistics() -> None:
    recipe = recipes.load("deit_ti", ["student.model_args={depth: 1}", "teacher=null", "projector=null", "distill=null"])
    distiller = build_distiller(recipe, 5, [])
    for parameter in distiller.student.patch_embed.parameters():
        parameter.requires_grad_(False)
    norms = [each for each in distiller.train().modules() if isinstance(each, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert distiller.student.blocks.training


def test_held_out_images_are_of_every_class_and_not_trained_on(fashion_folder: Path) -> None:
    source = open_source("image_folder", fashion_folder, "train")
    rest, held = split_holdout(source, 0.25, 7)
    assert (len(rest), len(held)) == (180, 60)
    assert all((held.labels == label).sum() == 6 for label in range(10))
    names = [{each.where(index) for index in range(len(each))} for each in (rest, held)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {source.where(index) for index in range(240)}
    assert rest[3][1] == rest.labels[3]
    again = split_holdout(source, 0.25, 7)[1]
    assert names[1] == {again.where(index) for index in range(60)}
    with pytest.raises(UserError, match="less than an image"):
        split_holdout(source, 0.001, 7)


def test_training_stops_where_held_out_images_are_told_no_better(
    weights: Path, fashion_folder: Path, train_cli: Cli, tmp_path: Path
) -> None:
    """A learning rate of next to nothing: the first evaluation is the best, two epochs later the run is over, and stays so."""
    options = ["--data", fashion_folder, "--output", tmp_path / "run", *SMALL, "epochs=9", "optim.lr=1e-12", "optim.warmup_lr=0"]
    options += [f"finetune.weights={weights}", "finetune.holdout=0.25", "finetune.patience_epochs=2", "optim.min_lr=0"]
    for _ in range(2):
        code, said = train_cli("--recipe", "finetune", *options)
        assert code == 0, said
        evaluations = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
        assert [line["epoch"] for line in evaluations] == [1, 2, 3]
        assert {line["holdout_images"] for line in evaluations} == {60}
    card = (tmp_path / "run/student/README.md").read_text()
    assert "60 training images that were held out" in card
    assert "stopped at step 21 of 63" in card


@pytest.mark.slow
def test_the_command(weights: Path, fashion_folder: Path, tmp_path: Path) -> None:
    """Size and normalization are those of the weights; overrides of the user win."""
    command = ["-m", "deit_kd", "finetune", weights, "--data", fashion_folder, "--output", tmp_path / "run"]
    command += [
        "--device",
        "cpu",
        "epochs=1",
        "global_batch_size=120",
        "run.workers=0",
        "optim.warmup_epochs=0",
        "evaluation.crop_pct=1.0",
    ]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    recipe = recipes.load(tmp_path / "run/recipe.yaml")
    assert recipe.evaluation.crop_pct == 1.0
    assert recipe.data.mean == pytest.approx(timm.data.resolve_model_data_config(deit_kd.load_student(weights))["mean"])
    assert recipe.finetune is not None
    assert recipe.finetune.weights == str(weights)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.weights=runs/none"], "no such file, and no folder"),
        (["finetune.frozen=[block.0]"], "no parameter that begins with block.0 .did you mean blocks.0"),
        (["finetune.frozen=[backbone, head]"], "leaves nothing to train"),
        (["student.name=resnet10t"], "is a deit_tiny_distilled_patch16_224; set student.name=auto"),
        (["finetune.patience_epochs=3"], "needs finetune.holdout"),
        (["finetune=null"], "student.name: auto, but finetune is null"),
        (["student.model_args={depth: 1}"], "are those of finetune.weights"),
        (["data.img_size=30"], "with .*: 1 faults\n  data.img_size: 30 is not divisible by the patch size 7"),
        (["finetune.layer_decay=1.5"], r"must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(
    overrides: list[str], message: str, weights: Path, fashion_folder: Path, train_cli: Cli, tmp_path: Path
) -> None:
    code, said = train_cli(
        *("--recipe", "finetune", "--data", fashion_folder, "--output", tmp_path / "run", *SMALL, f"finetune.weights={weights}"),
        *overrides,
    )
    assert code == 2
    assert re.search(message, said), said
