"""JPEGs that the device decodes, against the same recipe with Pillow, on real photos."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg

from conftest import SMALL, python_calls
from deit_kd import recipe as recipes
from deit_kd.data import LoaderConfig, TrainLoader, decode, open_source
from deit_kd.data.loader import _seeded
from deit_kd.data.on_device import jpegs
from deit_kd.data.on_device.augment import OnDevice, choose_augmentation
from deit_kd.data.on_device.draws import Crop, make_plan
from deit_kd.data.on_device.jpegs import Decoder, UndecodedError, resized
from deit_kd.data.transforms import train_transform
from deit_kd.errors import UserError
from deit_kd.seed import derive_seed
from sections import augmenting, training

CPU = torch.device("cpu")
SHAPES = [(500, 375), (375, 500), (512, 512), (700, 200), (200, 700), (120, 90), (64, 64)]
DECODED = ["run.augment_on=device", "run.decode_on=device"]
HEAVY = ["augmentation.auto_augment=rand-m9-mstd0.5-inc1", "augmentation.random_erasing=0.5", "augmentation.interpolation=random"]


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "jpeg", **{"quality": 90, **options})
    return stream.getvalue()


@pytest.fixture(scope="module")
def images(photos: list[tuple[Path, int]]) -> list[Image.Image]:
    """The photos in many shapes, one of them gray."""
    opened = [Image.open(file).convert("RGB").resize(SHAPES[n % len(SHAPES)]) for n, (file, _) in enumerate(photos)]
    return [*opened[1:], opened[0].convert("L")]


@pytest.fixture(scope="module")
def files(images: list[Image.Image]) -> list[bytes]:
    """JPEGs as cameras and ImageNet have them."""
    return [jpeg(image) for image in images]


@pytest.fixture
def folder(images: list[Image.Image], tmp_path: Path) -> Path:
    """train/ and val/ of two classes: 20 JPEGs that a device decodes, and 4 files that it does not."""
    for n in range(24):
        for split in ("train", "val"):
            (tmp_path / "data" / split / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        place, image = tmp_path / "data" / "train" / "ab"[n % 2], images[n % 20]
        if n < 20:
            (place / f"{n}.jpg").write_bytes(jpeg(image))
        elif n < 22:
            image.save(place / f"{n}.png")
        else:
            (place / f"{n}.jpg").write_bytes(jpeg(image.convert("CMYK")) if n == 22 else jpeg(image, progressive=True))
        image.save(tmp_path / "data" / "val" / "ab"[n % 2] / f"{n}.png")
    return tmp_path / "data"


def loader(folder: Path, *overrides: str, workers: int = 0, bad: str = "refuse", **layout: int) -> tuple[TrainLoader, list[str]]:
    """It, and what it warns of."""
    recipe = recipes.load("quickstart", [*HEAVY, "data.img_size=49", *overrides])
    warned: list[str] = []
    place = LoaderConfig(CPU, layout.get("processes", 1), layout.get("process", 0), workers, bad, warned.append)
    size = layout.get("batch", 12)
    source, transform = (
        open_source("image_folder", folder, "train"),
        choose_augmentation(recipe.data, recipe.augmentation, recipe.run, CPU),
    )
    options = {"num_classes": 2, "seed": 5, "global_batch_size": size, "accumulation_steps": 1}
    return TrainLoader(source, transform, recipe.augmentation, place, **options), warned  # type: ignore[arg-type]


def seen(folder: Path, *overrides: str, epoch: int = 0, **layout: int) -> tuple[Tensor, Tensor]:
    """(images, indices) of an epoch, in the order of their indices, over all processes."""
    batches = []
    for process in range(layout.get("processes", 1)):
        batches += list(loader(folder, *overrides, process=process, **layout)[0].epoch(epoch))
    indices = torch.cat([batch.indices for batch in batches])
    return torch.cat([batch.images for batch in batches])[indices.argsort()], indices.sort().values


def test_what_is_sent_as_it_is(images: list[Image.Image], files: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    image, as_jpeg = images[0], decode.as_jpeg
    for content in [*files, jpeg(image, subsampling=0), jpeg(image, subsampling=1)]:
        found = as_jpeg(content)
        assert found is not None
        assert (found.width, found.height) == Image.open(io.BytesIO(content)).size
        assert bytes(found.content.numpy()) == content
    png = io.BytesIO()
    image.save(png, "png")
    others = [jpeg(image, progressive=True), jpeg(image.convert("CMYK")), jpeg(image, keep_rgb=True), png.getvalue()]
    for content in [*others, files[0][:-1], files[0][: len(files[0]) // 2], files[0] + b"\0"]:
        assert as_jpeg(content) is None
    monkeypatch.setattr(decode, "MOST_PIXELS", image.width * image.height - 1)
    assert as_jpeg(jpeg(image)) is None
    for cut in range(0, 600, 37):  # in the header: as the decoder has it
        try:
            Image.open(io.BytesIO(files[0][:cut]))
        except Exception as error:
            with pytest.raises(type(error)):
                as_jpeg(files[0][:cut])


@pytest.mark.parametrize("size", [48, 112])
def test_draws_and_crops_are_those_of_pillow(size: int, files: list[bytes]) -> None:
    """The CPU's decoder gives Pillow's pixels, so what is cut out of them is to be Pillow's bit for bit."""
    overrides = [*HEAVY, f"data.img_size={size}"]
    held, sent = (
        choose_augmentation(*augmenting(recipes.load("deit_ti", [*overrides, *on])), CPU) for on in (DECODED[:1], DECODED)
    )
    crop, flip, *_ = train_transform(*training(recipes.load("deit_ti", overrides))).transforms  # type: ignore[attr-defined]
    assert isinstance(held, OnDevice)
    assert isinstance(sent, OnDevice)
    pillows, theirs, ours = [], [], []
    for seed, content in enumerate(files * 4):
        with _seeded(seed):
            pillows.append(decode.as_pixels(flip(crop(decode.decode_image(content)))))
        with _seeded(seed):
            theirs.append(held.worker(decode.decode(content)))
            after = random.random(), torch.rand(1)
        found = decode.as_jpeg(content)
        assert found is not None
        with _seeded(seed):
            ours.append(sent.worker(found))
            assert (random.random(), torch.rand(1)) == after
    assert [each[1:] for each in ours] == [each[1:] for each in theirs]
    crops = [each.image for each in ours if isinstance(each.image, Crop)]
    assert len(crops) == 80
    assert 20 < sum(each.mirrored or each.lines_mirrored for each in crops) < 60
    assert 20 < sum(each.bicubic for each in crops) < 60
    assert any(each.columns for each in crops)
    plan = make_plan(ours)
    assert plan.jpegs is not None
    decoded = Decoder(size, CPU)(plan.jpegs)
    assert torch.equal(decoded, torch.stack(pillows))
    held_crops = torch.stack([each.image for each in theirs if isinstance(each.image, Tensor)])
    error = (decoded.double() - held_crops.double()).square().mean((1, 2, 3)).clamp(min=1e-9)
    assert (10 * torch.log10(255**2 / error)).mean() > 70


def test_a_batch_is_its_images_however_it_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with JPEGs beside files that workers decode, it is what workers would have made of them."""
    whole, order = seen(folder, *DECODED, batch=24)
    assert order.tolist() == list(range(24))
    for layout in ({"batch": 6}, {"batch": 8, "workers": 1}, {"batch": 12, "processes": 2}):
        assert torch.equal(seen(folder, *DECODED, **layout)[0], whole)
    monkeypatch.setattr(jpegs, "MOST_AT_ONCE", 1)
    assert torch.equal(seen(folder, *DECODED, batch=24)[0], whole)
    theirs, _ = seen(folder, DECODED[0], batch=24)
    held = [n for n, path in enumerate(sorted((folder / "train").rglob("*.*"))) if int(path.stem) >= 20]
    assert torch.equal(whole[held], theirs[held]), "not decoded on the device"
    difference = (
        (whole - theirs).abs().flatten(1).mean(1) * 0.353 * 255
    )  # gray levels; operations may make more of the one of crops
    assert 0 < difference.max() < 0.3
    assert difference.count_nonzero() > 15
    assert not torch.equal(whole, seen(folder, *DECODED, batch=24, epoch=1)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_files_are_named_or_skipped(workers: int, folder: Path, files: list[bytes]) -> None:
    """One is cut off, which a worker finds; of another the device's decoder finds that its tables are gone."""
    tables = files[0].index(b"\xff\xc4")
    for name, content, reason in (
        ("4.jpg", files[0][:-400], "truncated"),
        ("4.jpg", files[0][: tables + 4] + b"\xff" * 20 + files[0][tables + 24 :], "broken|unrecognized|cannot"),
    ):
        path = folder / "train" / "a" / name
        path.write_bytes(content)
        refusing, warned = loader(folder, *DECODED, workers=workers)
        with pytest.raises(
            UserError, match=rf"^\S+{name}: cannot be read \(.*({reason}).*\); remove it, or set data.on_bad_image=skip$"
        ):
            list(refusing.epoch(0))
        skipping, warned = loader(folder, *DECODED, workers=workers, bad="skip")
        skipped = list(skipping.epoch(0))
        assert sum(len(batch.images) for batch in skipped) == 24
        assert sum(f"{name}: cannot be read" in each and "the next image takes its place" in each for each in warned) == 1
        assert sum("the device cannot decode a JPEG" in each for each in warned) == (0 if reason == "truncated" else 1)


def test_a_file_that_the_device_refuses_is_decoded_on_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone, whatever the size of its batches; its neighbors are what they are without it."""
    ours, _ = seen(folder, *DECODED, batch=12)
    theirs, _ = seen(folder, DECODED[0], batch=12)
    file, source = folder / "train" / "a" / "4.jpg", open_source("image_folder", folder, "train")
    refused = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)

    def fail(contents: list[Tensor], *more: Any) -> Any:
        if any(torch.equal(content, refused) for content in contents):
            raise RuntimeError("nvjpeg\nsays no")
        return decode_jpeg(contents, *more)

    monkeypatch.setattr(jpegs, "decode_jpeg", fail)
    for batch in (12, 6):
        mixed, indices = seen(folder, *DECODED, batch=batch)
        its = torch.tensor([Path(source.where(n)) == file for n in indices.tolist()])
        assert its.sum() == 1
        assert torch.equal(mixed[~its], ours[~its])
        assert torch.equal(mixed[its], theirs[its])
    loaded, warned = loader(folder, *DECODED)
    list(loaded.epoch(0))
    (told,) = warned
    assert told.endswith("4.jpg: the device cannot decode a JPEG (nvjpeg says no); the CPU is to")


def test_a_device_that_decodes_no_more_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = loader(folder, *DECODED)

    def fail(*_: Any) -> Any:
        raise RuntimeError("nvjpeg\nsays no")

    monkeypatch.setattr(jpegs, "decode_jpeg", fail)
    with pytest.raises(RuntimeError, match="nvjpeg"):
        list(ours.epoch(0))
    with pytest.raises(UserError, match=r"^run.decode_on=device: torchvision decodes no JPEG there \(nvjpeg says no\); use run"):
        Decoder(48, CPU)


def test_other_sizes_than_the_headers_are_refused(files: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    sent, found = choose_augmentation(*augmenting(recipes.load("deit_ti", DECODED)), CPU), decode.as_jpeg(files[0])
    assert isinstance(sent, OnDevice)
    assert found is not None
    plan = make_plan([sent.worker(found)])
    assert plan.jpegs is not None
    decoder = Decoder(48, CPU)
    monkeypatch.setattr(jpegs, "decode_jpeg", lambda files, *rest: [each[:, 1:] for each in decode_jpeg(files, *rest)])
    with pytest.raises(UndecodedError, match="another size"):
        decoder(plan.jpegs)


def test_the_main_process_does_nothing_for_each_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls of Python functions for half as many images again, but for what torchvision does with its list."""
    calls = []

    def unseen(*arguments: Any) -> Any:
        seen_by = sys.getprofile()
        sys.setprofile(None)
        decoded = decode_jpeg(*arguments)
        sys.setprofile(seen_by)
        return decoded

    monkeypatch.setattr(jpegs, "decode_jpeg", unseen)
    for size in (8, 12):
        batches = loader(folder, *DECODED, "augmentation.auto_augment=null", workers=1, batch=size)[0].epoch(0)
        next(batches)
        with python_calls() as counted:
            batch = next(batches)
        assert len(batch.images) == size
        calls.append(counted)
    assert calls[0][jpegs.__file__, "resized"] == 1
    assert {name: n for name, n in (calls[1] - calls[0]).items() if n >= 4} == {}, "four more images"


def test_resizing_never_waits_for_the_device(files: list[bytes]) -> None:
    """On the meta device there are no values: whatever would bring one to the host raises."""
    sent, drawn = choose_augmentation(*augmenting(recipes.load("deit_ti", DECODED)), CPU), []
    assert isinstance(sent, OnDevice)
    for seed, content in enumerate(files):
        found = decode.as_jpeg(content)
        assert found is not None
        with _seeded(derive_seed(0, "sample", seed)):
            drawn.append(sent.worker(found))
    plan = make_plan(drawn)
    assert plan.jpegs is not None
    table = plan.jpegs.table
    crops = resized(torch.empty(3 * int(table[1].sum()), dtype=torch.uint8, device="meta"), table, 224)
    assert (crops.shape, crops.dtype, crops.device.type) == ((20, 3, 224, 224), torch.uint8, "meta")


def test_where_images_are_decoded() -> None:
    assert recipes.load("deit_ti").run.decode_on == "workers"
    for stated in ("auto", "cpu"):
        with pytest.raises(UserError, match=r"^run.decode_on=device: .*; use run.augment_on=device, or run.decode_on=workers$"):
            choose_augmentation(*augmenting(recipes.load("deit_ti", ["run.decode_on=device", f"run.augment_on={stated}"])), CPU)
    chosen = choose_augmentation(*augmenting(recipes.load("deit_ti", DECODED)), CPU)
    assert isinstance(chosen, OnDevice)
    assert chosen.worker.sends_jpegs
    padded = ["augmentation.crop_scale=null", "augmentation.crop_padding=4"]
    with pytest.raises(
        UserError, match=r"^run.decode_on=device: crops of padded images are cut in the workers; use run.decode_on=workers$"
    ):
        choose_augmentation(*augmenting(recipes.load("deit_ti", [*DECODED, *padded])), CPU)


@pytest.mark.slow
def test_a_run_goes_on_bit_exactly(folder: Path, tmp_path: Path, train_cli: Callable[..., tuple[int, str]]) -> None:
    options = ["--recipe", "quickstart", "--data", folder, *SMALL, *HEAVY, *DECODED, "global_batch_size=12"]
    options += ["teacher.name=resnet10t", "teacher.weights=random", "run.save_every_steps=2", "run.eval_every_epochs=9"]
    options += ["data.num_classes=2"]
    students = []
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for stop in steps:
            code, printed = train_cli(*options, "--output", tmp_path / name, "--max-steps", stop)
            assert code == 0, printed
        students.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]
    told = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert told["decoded_on"] == told["earlier_sessions"][0]["decoded_on"] == "cpu"
    assert "| JPEGs decoded on | the device (cpu) |" in (tmp_path / "parts" / "student" / "README.md").read_text()
