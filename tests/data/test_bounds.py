"""What is well formed and would take gigabytes: resized images, tokens; and names of classes that look like secrets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from deit_kd import recipe as recipes
from deit_kd.data.transforms import MustFit, evaluation_transform, own_transform, train_transform
from deit_kd.errors import UserError
from deit_kd.evaluation.predict import predict
from deit_kd.export.publish import must_be_clean
from deit_kd.models import load_student
from deit_kd.models.config_json import read_config
from deit_kd.text import for_markdown
from sections import evaluating, training

CONFIG = {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("side", "crop", "mode", "width", "height"),
    [
        (4096, 0.2, "center", 4000, 100),
        (384, 0.2, "center", 4000, 20),
        (384, 0.2, "center", 20, 4000),
        (4096, 0.2, "squash", 10, 10),
        (2048, 0.2, "squash", 50, 9000),  # resized by columns first, all lines of it
        (4096, 0.2, "border", 300, 300),
    ],
)
def test_an_image_that_would_be_too_large_is_refused(side: int, crop: float, mode: str, width: int, height: int) -> None:
    transform = own_transform(input_size=(3, side, side), crop_pct=crop, crop_mode=mode, **CONFIG)
    with pytest.raises(ValueError, match=rf"is {width:,} x {height:,} pixels, which would be resized to .*; crop it"):
        transform(Image.new("RGB", (width, height)))


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 32, 48)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_other_images_are_as_timm_has_them(size: tuple[int, int, int], mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 300, 3), dtype=np.uint8))
    config = {"input_size": size, "crop_pct": 0.9, "crop_mode": mode, **CONFIG}
    transform = own_transform(**config)
    assert isinstance(transform.transforms[0], MustFit)
    assert torch.equal(transform(image), timm.data.create_transform(**config, is_training=False)(image))


def test_loaders_refuse_them_too() -> None:
    overrides = ["data.img_size=4096", "evaluation.crop_pct=0.5"]
    with pytest.raises(ValueError, match="would be resized to"):
        evaluation_transform(*evaluating(recipes.load("deit_ti", overrides)))(Image.new("RGB", (400, 20)))
    padded = ["data.img_size=1024", "augmentation.crop_scale=null", "augmentation.crop_padding=4"]
    with pytest.raises(ValueError, match="would be resized to"):
        train_transform(*training(recipes.load("deit_ti", padded)))(Image.new("RGB", (2000, 20)))


def test_predict_names_such_an_image_and_no_secret(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3).eval()
    model.pretrained_cfg |= {"input_size": (3, 384, 384), "crop_pct": 0.2}
    Image.new("RGB", (4000, 20)).save(tmp_path / "strip.png")
    names = [str(tmp_path / "strip.png"), "https://u:S3CR3T@h.test/x.png?token=S3CR3T"]
    strip, address = predict(model, names, torch.device("cpu"), 64, 1)
    assert "would be resized to" in strip["error"]
    assert address["image"] == "https://h.test/x.png"
    assert "S3CR3T" not in json.dumps(address)


@pytest.mark.parametrize(
    "overrides",
    [["student.model_args={patch_size: 1}", "data.img_size=2048"], ["student.model_args={patch_size: 7}", "data.img_size=4088"]],
)
def test_a_recipe_has_a_bounded_number_of_tokens(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"data.img_size: \d+ in patches of \d are .* tokens, at most 65,536"):
        recipes.load("deit_ti", overrides)
    recipes.load("deit_ti", ["student.model_args={patch_size: 8}", "data.img_size=2048"])


def test_a_student_has_a_bounded_number_of_tokens(tmp_path: Path) -> None:
    arguments = {"patch_size": 7, "img_size": 14, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = timm.create_model("deit_tiny_patch16_224", **arguments)
    folder = tmp_path / "student"
    model.pretrained_cfg |= {"input_size": (3, 14, 14), "num_classes": 2}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    assert load_student(folder, img_size=28).patch_embed.num_patches == 16
    with pytest.raises(UserError, match="images of 4095 pixels a side in patches of 7 are 342,225 tokens, more than 65,536"):
        load_student(folder, img_size=4095)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["img_size"] = 4096  # which timm takes for the size of its images
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: images of 4096 pixels a side"):
        read_config(folder / "config.json")


NAMES = ["hf_ABCDEFGHIJKLMNOP", "token=abcdefgh", "user:pass@host", "/home/anna/x", "cat"]


def test_names_of_classes_that_look_like_secrets_may_be_published(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    content = {"label_names": NAMES, "pretrained_cfg": {"label_names": NAMES}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "README.md").write_text("\n".join(for_markdown(name, 100) for name in NAMES))
    (folder / "recipe.yaml").write_text("\n".join(f"- {name}" for name in NAMES))
    (folder / "report.json").write_text(json.dumps({"per_class": dict.fromkeys(NAMES, 1.0), "worst": NAMES}))
    must_be_clean(folder, tmp_path)
    (folder / "README.md").write_text("token=abcdefgh, then token=other_SECRET")
    with pytest.raises(UserError, match=r"README.md holds 'a password, a token"):
        must_be_clean(folder, tmp_path)
