"""Sources, transforms, and the sample stream."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

from deit_kd import recipe as recipes
from deit_kd.data import EvaluationLoader, LoaderConfig, open_source
from deit_kd.data.build import open_data
from deit_kd.data.loader import SKIPPED
from deit_kd.data.mixing import mix, partner, smooth_one_hot
from deit_kd.data.sources.catalog import EMBEDDED
from deit_kd.data.transforms import evaluation_transform, train_transform
from deit_kd.errors import UserError
from sections import evaluating, training
from streams import CPU, HEAVY, stream, train_loader


@pytest.mark.parametrize("on", ["cpu", "device"])
def test_the_stream_depends_on_seed_epoch_and_index_alone(on: str, fashion_folder: Path) -> None:
    whole = stream(fashion_folder, 1, on=on)
    assert len(whole) == 240
    for layout in ({"workers": 3}, {"workers": 1, "processes": 2}, {"processes": 2, "accumulation": 2}, {"accumulation": 3}):
        assert stream(fashion_folder, 1, on=on, **layout) == whole, layout
    assert not stream(fashion_folder, 2, on=on) & whole
    resumed = stream(fashion_folder, 1, start=7, on=on)
    assert len(resumed) == 72
    assert resumed < whole


def test_loading_leaves_the_models_random_stream_alone(fashion_folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(train_loader(fashion_folder).epoch(0))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_evaluation_counts_each_image_once_for_any_number_of_processes(fashion_folder: Path) -> None:
    source, transform = (
        open_source("image_folder", fashion_folder, "val"),
        evaluation_transform(*evaluating(recipes.load("quickstart"))),
    )
    for processes in (1, 3, 7):
        labels = []
        for process in range(processes):
            loader = EvaluationLoader(source, transform, LoaderConfig(CPU, processes, process, 0, "refuse", print), batch_size=9)
            batches = list(loader)
            assert len({images.shape for images, _ in batches}) == 1, "compiled networks see one size"
            labels += [label for _, batch in batches for label in batch.tolist() if label != SKIPPED]
        assert sorted(labels) == sorted(source[i][1] for i in range(40))


def test_embedded_subset_is_stratified() -> None:
    for split, count in (("train", 1200), ("val", 200)):
        source = open_source("fashion_mnist", None, split)  # type: ignore[arg-type]
        assert np.bincount(source.labels).tolist() == [count] * 10  # type: ignore[attr-defined]
    image, label = source[0]
    assert (image.size, image.mode, label in range(10)) == ((28, 28), "RGB", True)
    assert "MIT" in (EMBEDDED.parent / "README.md").read_text()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_idx_files(packed: bool, nested: bool, tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw" if nested else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(6, dtype=np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            name = f"{split}-{kind}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    source = open_source("fashion_mnist", tmp_path, "val")
    assert len(source) == 6
    np.testing.assert_array_equal(np.asarray(source[3][0])[..., 1], images[3])
    with pytest.raises(UserError, match=r"has 6 training images, the recipe says data.train_images=60000"):
        open_data(recipes.load("quickstart_teacher").data, tmp_path)
    broken = next(folder.glob("t10k-images*"))
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        open_source("fashion_mnist", tmp_path, "val")


def test_synset_folders_keep_imagenets_labels(photo_folder: Path, photos: list[tuple[Path, int]]) -> None:
    source = open_source("image_folder", photo_folder, "train")
    assert len(source.class_names) == 1000
    assert {(Path(source.where(i)).name, source[i][1]) for i in range(20)} == {(file.name, label) for file, label in photos}


def test_missing_and_empty_data(fashion_folder: Path, tmp_path: Path) -> None:
    def fault(name: str, data: Path | None) -> str:
        with pytest.raises(UserError) as raised:
            open_source(name, data, "train"), open_source(name, data, "val")
        return str(raised.value)

    assert "pass --data DIR" in fault("image_folder", None)
    assert "no such directory" in fault("image_folder", tmp_path / "none")
    assert "has no train folder" in fault("image_folder", tmp_path)
    assert "did you mean cifar10" in fault("cifar11", None)
    assert "pass --data DIR" in fault("cifar100", None)
    copy = tmp_path / "copy"
    shutil.copytree(fashion_folder, copy)
    (copy / "train" / "empty").mkdir()
    assert f"{copy / 'train' / 'empty'}: the class has no image" in fault("image_folder", copy)
    shutil.rmtree(copy / "train" / "empty")
    (copy / "val" / "9 Ankle bot").mkdir()
    assert "class '9 Ankle bot' is not among the training classes (did you mean 9 Ankle boot?)" in fault("image_folder", copy)
    shutil.rmtree(copy / "val")
    assert "has no val or validation folder" in fault("image_folder", copy)
    with pytest.raises(UserError, match="has 10 classes, the recipe says data.num_classes=12"):
        open_data(recipes.load("quickstart", ["data.num_classes=12"]).data, None)


def test_a_download_that_fails_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").mkdir()  # in the way of the download
    with pytest.raises(UserError, match="does not hold CIFAR10, and downloading it failed"):
        open_source("cifar10", tmp_path, "train")


@pytest.fixture
def damaged(fashion_folder: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A copy of the folder with an empty image and a truncated one."""
    root = tmp_path / "damaged"
    shutil.copytree(fashion_folder, root)
    victims = sorted((root / "train").rglob("*.png"))[:2]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:80])
    return root, victims


@pytest.mark.parametrize(("workers", "on"), [(0, "cpu"), (2, "cpu"), (0, "device")])
def test_broken_images_are_refused_by_name(damaged: tuple[Path, list[Path]], workers: int, on: str) -> None:
    root, victims = damaged
    with pytest.raises(UserError) as raised:
        list(train_loader(root, workers=workers, on=on).epoch(0))
    message = str(raised.value)
    assert any(str(victim) in message for victim in victims)
    assert message.endswith("remove it, or set data.on_bad_image=skip")
    assert "\n" not in message


@pytest.mark.parametrize("on", ["cpu", "device"])
def test_broken_images_are_skipped_when_the_recipe_says_so(
    damaged: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], on: str
) -> None:
    root, victims = damaged
    assert sum(len(batch.images) for batch in train_loader(root, bad="skip", on=on).epoch(0)) == 240
    printed = capsys.readouterr().out
    assert f"{victims[0]}: cannot be read (empty file); the next image takes its place" in printed
    assert str(victims[1]) in printed


def test_augmentation_survives_full_magnitude_posterize() -> None:
    """timm's own transform raises here: PosterizeIncreasing asks for 0 bits at magnitude 10, which Pillow 13 refuses."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    recipe = recipes.load("quickstart", ["augmentation.auto_augment=rand-m10-inc1", "data.img_size=28"])
    transform = train_transform(recipe.data, recipe.augmentation)
    operations = [op for step in transform.transforms for op in getattr(step, "ops", ()) if op.name == "PosterizeIncreasing"]  # type: ignore[attr-defined]
    assert operations
    for operation in operations:
        operation.prob = 1.0
        posterized = np.asarray(operation(image))
        assert set(np.unique(posterized)) == {0, 128}
    theirs = next(op for op in rand_augment_transform("rand-m10-inc1", {}).ops if op.name == "PosterizeIncreasing")
    theirs.prob = 1.0
    try:
        black = np.asarray(theirs(image)).max() == 0
    except ValueError:
        black = True
    assert black, "timm posterizes without harm now: the guard can go"


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P", "LA", "CMYK", "1"])
def test_unusual_image_modes_are_read(mode: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    image = Image.fromarray(ramp) if mode == "I;16" else Image.fromarray((ramp >> 8).astype(np.uint8)).convert(mode)
    image.save(tmp_path / "train" / "a" / f"x.{'tif' if mode == 'CMYK' else 'png'}")
    pixels = np.asarray(open_source("image_folder", tmp_path, "train")[0][0])
    assert pixels.shape == (8, 8, 3)
    if mode == "I;16":
        np.testing.assert_array_equal(pixels[..., 0], ramp >> 8)


def test_three_augment_and_unknown_augmentation() -> None:
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    tensor = train_transform(
        *training(recipes.load("quickstart", ["augmentation.auto_augment=3a", "augmentation.color_jitter=0.3"]))
    )(image)
    assert tensor.shape == (3, 28, 28)
    with pytest.raises(UserError, match="timm does not know it"):
        train_transform(*training(recipes.load("quickstart", ["augmentation.auto_augment=4a"])))


def test_smoothing_and_mixing_equal_timms() -> None:
    labels = torch.tensor([0, 3, 1, 1])
    theirs = Mixup(mixup_alpha=0.0, cutmix_alpha=0.0, prob=0.0, label_smoothing=0.1, num_classes=4)
    _, expected = theirs(torch.zeros(4, 3, 8, 8), labels)
    torch.testing.assert_close(smooth_one_hot(labels, 4, 0.1), expected)

    recipe = recipes.load("quickstart", HEAVY)
    images, targets = torch.randn(6, 3, 16, 16), torch.eye(6)
    kinds = set()
    for draw in range(20):
        mixed, soft = mix(images, targets, recipe.augmentation, np.random.default_rng(draw))
        other = partner(6, CPU)
        ratio = soft[0, 0].item()
        torch.testing.assert_close(soft, ratio * targets + (1 - ratio) * targets[other])
        kept = (mixed == images).all(1).float().mean((1, 2))
        if kept.max() > 0 or ratio == 0:  # cutmix: pixels are one's own or the partner's, and the ratio is their share
            kinds.add("cutmix")
            assert ((mixed == images) | (mixed == images[other])).all()
            torch.testing.assert_close(kept, torch.full((6,), ratio))
        else:
            kinds.add("mixup")
            torch.testing.assert_close(mixed, ratio * images + (1 - ratio) * images[other])
    assert kinds == {"cutmix", "mixup"}
    assert partner(5, CPU).tolist() == [1, 0, 3, 2, 4]
