"""Decoding, and augmentation on the device, against Pillow and timm on real photos."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SMALL
from deit_kd import recipe as recipes
from deit_kd.data.decode import MOST_ELONGATED, as_pixels, decode, decode_image
from deit_kd.data.loader import _seeded
from deit_kd.data.on_device.augment import Finish, OnDevice, choose_augmentation
from deit_kd.data.on_device.draws import AugmentParams, _record, make_plan
from deit_kd.data.sources.base import Subset, pixels
from deit_kd.data.sources.catalog import open_source
from deit_kd.data.sources.pack import pack
from deit_kd.data.transforms import _keep_one_bit, augment_operations, train_transform
from deit_kd.errors import UserError
from deit_kd.recipe import Recipe
from fake_gpu import VIEWS
from sections import augmenting

CPU = torch.device("cpu")
SIZE = 112
ON_DEVICE = ["run.augment_on=device", f"data.img_size={SIZE}"]


@pytest.fixture(scope="module")
def files(photos: list[tuple[Path, int]]) -> list[bytes]:
    return [file.read_bytes() for file, _ in photos]


@pytest.fixture(scope="module")
def squares(files: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(file)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for file in files]


def both(overrides: list[str]) -> tuple[Recipe, Any, OnDevice]:
    recipe = recipes.load("deit_ti", [*ON_DEVICE, *overrides])
    on_device = choose_augmentation(recipe.data, recipe.augmentation, recipe.run, CPU)
    assert isinstance(on_device, OnDevice)
    return recipe, train_transform(recipe.data, recipe.augmentation), on_device


def test_pixels_are_pillows(files: list[bytes]) -> None:
    image = Image.open(io.BytesIO(files[0])).convert("RGB").resize((301, 203))
    turned = Image.Exif()
    turned[0x0112] = 6
    variants = [
        ("RGB", {"quality": 90}),
        ("RGB", {"quality": 96, "subsampling": 0}),
        ("RGB", {"progressive": True}),
        ("RGB", {"exif": turned}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("CMYK", {}),
    ]
    made = []
    for mode, options in variants:
        stream = io.BytesIO()
        image.convert(mode).save(stream, "jpeg", **options)  # type: ignore[arg-type]
        made.append(stream.getvalue())
    stream = io.BytesIO()
    image.save(stream, "png")
    for content in [*files[:5], *made, stream.getvalue()]:
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(decode(content).permute(1, 2, 0).numpy(), expected)
        np.testing.assert_array_equal(np.asarray(decode_image(content)), expected)


def test_every_source_gives_the_pixels_of_its_images(photo_folder: Path, tmp_path: Path) -> None:
    pack(photo_folder, tmp_path / "shards", None, 10**6)
    folder, shards = open_source("image_folder", photo_folder, "train"), open_source("shards", tmp_path / "shards", "train")
    part, arrays = Subset(folder, np.array([7, 3])), open_source("fashion_mnist", None, "train")
    for source, indices in ((folder, range(4)), (shards, range(4)), (part, range(2)), (arrays, range(3))):
        for index in indices:
            np.testing.assert_array_equal(pixels(source, index).permute(1, 2, 0).numpy(), np.asarray(source[index][0]))
    assert folder.encoded(7) == part.encoded(0) == shards.encoded(7)
    assert arrays.encoded(0) is None


def test_damaged_files_fail_as_they_do_in_pillow(files: list[bytes]) -> None:
    stream = io.BytesIO()
    Image.open(io.BytesIO(files[0])).resize((48, 32)).save(stream, "jpeg", quality=80)
    whole = stream.getvalue()
    damaged = [whole[:cut] for cut in (*range(0, len(whole), 37), len(whole) - 1)]
    draw = random.Random(0)
    for _ in range(100):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] = draw.randrange(256)
        damaged.append(bytes(changed))
    read = 0
    for content in damaged:
        try:
            opened = Image.open(io.BytesIO(content))
            if max(opened.size) > MOST_ELONGATED * min(opened.size):
                raise ValueError("a shape that Pillow would take")
            expected = np.asarray(opened.convert("RGB"))
        except Exception as error:
            with pytest.raises(type(error)):
                decode(content)
        else:
            read += 1
            np.testing.assert_array_equal(decode(content).permute(1, 2, 0).numpy(), expected)
    assert 20 < read < 120


@pytest.mark.parametrize("name", auto_augment.NAME_TO_OP)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_each_operation_is_timms_within_a_grey_level(name: str, interpolation: str, squares: list[Image.Image]) -> None:
    """At magnitudes drawn from all of [0, 10]; the streams are left at the same place."""
    recipe, reference, on_device = both([f"augmentation.interpolation={interpolation}", "augmentation.random_erasing=0"])
    parameters = augment_operations(reference.transforms[2])[0].hparams
    operation = auto_augment.AugmentOp(name, 1.0, 10, {**parameters, "magnitude_std": float("inf")})
    if name.startswith("Posterize"):
        _keep_one_bit(operation)
    theirs, drawn = [], []
    for seed, image in enumerate(squares):
        with _seeded(seed):
            theirs.append(np.asarray(operation(image)))
            after = random.random()
        original, operation.aug_fn = operation.aug_fn, lambda *a, **k: _record(name, SIZE, *a, **k)
        with _seeded(seed):
            drawn.append(AugmentParams(as_pixels(image), operation([]), None, 0))
            assert random.random() == after
        operation.aug_fn = original
    result = on_device.finish(torch.stack([each.image for each in drawn]), make_plan(drawn))
    levels = (result * torch.tensor(recipe.data.std).view(3, 1, 1) + torch.tensor(recipe.data.mean).view(3, 1, 1)) * 255
    difference = (levels - torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)).abs()
    assert difference.max() < 1.01
    geometric = name.startswith(("Rotate", "Shear", "Translate"))
    assert (difference > 0.01).float().mean() < (0.01 if geometric else 1e-9)


def pairs(overrides: list[str], images: list[Any], views: int = 1) -> tuple[Recipe, Tensor, list[AugmentParams], Tensor]:
    """(recipe, the CPU's result, what was drawn, the device's result) of views of images, each with its own seed."""
    recipe, reference, on_device = both(overrides)
    theirs, drawn = [], []
    for seed, image in enumerate(images * views):
        with _seeded(seed):
            theirs.append(reference(image))
        with _seeded(seed):
            drawn.append(on_device.worker(as_pixels(image)))
    return recipe, torch.stack(theirs), drawn, on_device.finish(torch.stack([each.image for each in drawn]), make_plan(drawn))


@pytest.mark.parametrize(
    "policy",
    [["rand-m9-mstd0.5-inc1", 0.0], ["rand-m7-n4-p0.9-mstd101-mmax12", 0.0], ["3a", 0.3], ["original-mstd0.5", 0.0], ["null", 0.3]],
)
def test_a_recipe_means_the_same_in_both_places(policy: list[Any], squares: list[Image.Image]) -> None:
    """Crops are whole images here, so that only what the device does can differ. Boxes are equal, their noise is standard normal."""
    overrides = [
        f"augmentation.auto_augment={policy[0]}",
        f"augmentation.color_jitter={policy[1]}",
        "augmentation.crop_scale=[1.0, 1.0]",
        "augmentation.random_erasing=0.5",
        "augmentation.interpolation=random",
    ]
    recipe, theirs, drawn, ours = pairs(overrides, squares, views=3)
    erased = 0
    difference = ((ours - theirs).abs() * torch.tensor(recipe.data.std).view(3, 1, 1) * 255).numpy()
    noise = []
    for number, each in enumerate(drawn):
        if each.box:
            top, left, height, width = each.box
            inside = np.s_[:, top : top + height, left : left + width]
            noise.append(ours[number].numpy()[inside].ravel())
            assert (difference[number][inside] > 0.01).mean() > 0.99
            difference[number][inside] = 0
            erased += 1
        if len(each.operations) < 2:
            assert difference[number].max() < 1.01, each.operations
        assert difference[number].mean() < 0.05, each.operations
    assert 15 < erased < 45
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_crops_are_pillows_to_70_db(files: list[bytes]) -> None:
    quiet = ["augmentation.auto_augment=null", "augmentation.random_erasing=0", "data.img_size=224"]
    recipe, theirs, _, ours = pairs(quiet, [decode_image(file) for file in files], views=2)
    error = ((ours - theirs) * torch.tensor(recipe.data.std).view(3, 1, 1) * 255).square().mean((1, 2, 3))
    decibel = 10 * torch.log10(255**2 / error)
    assert decibel.mean() > 70
    assert decibel.min() > 65


def test_padded_crops_are_equal(squares: list[Image.Image]) -> None:
    quiet = ["augmentation.auto_augment=null", "augmentation.random_erasing=0"]
    _, theirs, _, ours = pairs([*quiet, "augmentation.crop_scale=null", "augmentation.crop_padding=4"], squares)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_operations_and_magnitudes_are_distributed_as_timms() -> None:
    """The same draws, so the same counts exactly; and each of the 15 operations as often as the others."""
    _, reference, on_device = both(["augmentation.random_erasing=0", "data.img_size=32"])
    noted: list[Any] = []

    def note(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(image: Image.Image, *level: float, **kwargs: Any) -> Image.Image:
            noted.append((name, level))
            return original(image, *level, **kwargs)

        return function

    for operation in augment_operations(reference.transforms[2]):
        operation.aug_fn = note(operation.name, operation.aug_fn)
    image, counts = Image.new("RGB", (32, 32), (90, 120, 200)), Counter[str]()
    for seed in range(1500):
        noted.clear()
        with _seeded(seed):
            reference(image)
        with _seeded(seed):
            drawn = on_device.worker(as_pixels(image))
        assert len(noted) == len(drawn.operations)
        for (name, level), (ours, arguments) in zip(noted, drawn.operations, strict=True):
            counts[name] += 1
            if name in ("Invert", "AutoContrast", "Equalize"):
                assert (ours, level) == (name.lower(), ())
            elif name.startswith(("Shear", "Translate", "Rotate")):
                assert ours == "bicubic"
                assert len(arguments) == 6
            else:
                assert arguments == (level if not name.startswith("Posterize") else (max(1, level[0]),))
    assert len(counts) == 15
    assert sum(counts.values()) == pytest.approx(1500, rel=0.06)
    assert all(count == pytest.approx(100, abs=40) for count in counts.values())


def test_the_device_is_never_waited_for(squares: list[Image.Image]) -> None:
    """On the meta device there are no values: whatever would bring one to the host raises."""
    recipe, _, on_device = both(["augmentation.random_erasing=0.5", "augmentation.auto_augment=rand-m9-n8-p1.0-mstd0.5-inc1"])
    drawn = []
    for seed, image in enumerate(squares * 2):
        with _seeded(seed):
            drawn.append(on_device.worker(as_pixels(image)))
    plan = make_plan(drawn)
    assert all(map(any, list(zip(*plan.turns, strict=True))[1:8])), "each form of operation is there"
    images = Finish(recipe.data, torch.device("meta"), decodes=False)(torch.stack([each.image for each in drawn]), plan)
    assert images.shape == (40, 3, SIZE, SIZE)
    assert images.dtype == torch.float32


class Launches(TorchDispatchMode):
    """Counts what would be a kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.partition("::")[2] not in VIEWS
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_a_batch_of_256_takes_few_launches(interpolation: str, squares: list[Image.Image]) -> None:
    """The limit is only lowered: on a GPU a launch costs the host more than most of these kernels take."""
    recipe, _, on_device = both(["data.img_size=32", f"augmentation.interpolation={interpolation}"])
    drawn = []
    for seed in range(256):
        with _seeded(seed):
            drawn.append(on_device.worker(as_pixels(squares[seed % len(squares)])))
    images, plan, finish = torch.stack([each.image for each in drawn]), make_plan(drawn), Finish(recipe.data, CPU, decodes=False)
    finish(images.clone(), plan)
    with Launches() as launches:
        finish(images, plan)
    assert launches.count <= 150


def test_where_it_is_done() -> None:
    cuda = torch.device("cuda")  # nothing is put there
    mixed = ["augmentation.auto_augment=augmix-m5-w4-d2"]
    assert not isinstance(choose_augmentation(*augmenting(recipes.load("deit_ti")), CPU), OnDevice)
    assert not isinstance(choose_augmentation(*augmenting(recipes.load("deit_ti", ["run.augment_on=cpu"])), cuda), OnDevice)
    assert not isinstance(choose_augmentation(*augmenting(recipes.load("deit_ti", mixed)), cuda), OnDevice)
    with pytest.raises(
        UserError, match=r"run.augment_on=device: auto_augment=augmix-m5-w4-d2 is not made of single operations; use"
    ):
        choose_augmentation(*augmenting(recipes.load("deit_ti", [*mixed, "run.augment_on=device"])), CPU)
    with pytest.raises(UserError, match="timm does not know it"):
        choose_augmentation(*augmenting(recipes.load("deit_ti", ["augmentation.auto_augment=4a", "run.augment_on=device"])), CPU)


@pytest.mark.slow
def test_a_run_goes_on_bit_exactly(fashion_folder: Path, tmp_path: Path, train_cli: Callable[..., tuple[int, str]]) -> None:
    heavy = ["augmentation.auto_augment=rand-m9-mstd0.5-inc1", "augmentation.random_erasing=0.5", "augmentation.mixup=0.8"]
    options = ["--recipe", "quickstart", "--data", fashion_folder, *SMALL, *heavy, "augmentation.mixup_prob=1.0"]
    options += ["teacher.name=resnet10t", "teacher.weights=random"]
    options += ["augmentation.mixup_switch_prob=0.5", "run.augment_on=device", "run.save_every_steps=3", "run.eval_every_epochs=9"]
    students = []
    for name, steps in (("whole", [6]), ("parts", [3, 6])):
        for stop in steps:
            code, printed = train_cli(*options, "--output", tmp_path / name, "--max-steps", stop)
            assert code == 0, printed
        students.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["augmented_on"] == "device"
    assert "| Augmented on | the device |" in (tmp_path / "parts" / "student" / "README.md").read_text()
