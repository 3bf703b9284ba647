"""What a CPU core delivers: images a second of timm's recipe and of ours, whole or with the device doing its part; and how equal they are.

    python benchmarks/data.py [--quick]

Real photos as JPEGs of 500x375 pixels, the recipe deit_ti (random resized crops, RandAugment, erasing). One thread, CPU time of this process,
arms in random order in each round; ratios are medians over rounds with bootstrapped 95 % intervals. timm's arm is that of its prefetcher, which
leaves normalization and erasing to the GPU; its Posterize is kept from raising (Pillow 13 refuses its 0 bits). It is run twice: where the two
differ by more than 3 %, the machine was too busy. Writes results/speed_data.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.loader import fast_collate
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paired import facts, paired_rounds, ratio
from deit_kd import recipe as recipes
from deit_kd.data.decode import as_pixels, decode, decode_image
from deit_kd.data.loader import _collate, _Item, _seeded
from deit_kd.data.on_device.augment import OnDevice, choose_augmentation
from deit_kd.data.on_device.draws import AugmentParams, make_plan
from deit_kd.data.transforms import _keep_one_bit, augment_operations, train_transform

CPU = torch.device("cpu")
RECIPE = recipes.load("deit_ti", ["run.augment_on=device"])
SIZES = {"500x375 q90": (500, 375, 90, 2), "500x375 q96 4:4:4": (500, 375, 96, 0), "short side 256 q90": (341, 256, 90, 2)}


def photos(width: int, height: int, quality: int, subsampling: int) -> list[bytes]:
    """JPEG files of foolbox's photos of ImageNet, cut to 500x375 and then shrunk where a smaller size is asked for."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        sys.exit("error: the photos are those of the package foolbox: pip install foolbox")
    files = []
    for file in sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg")):
        image = Image.open(file).convert("RGB").crop((6, 68, 506, 443)).resize((width, height), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "jpeg", quality=quality, subsampling=subsampling)
        files.append(stream.getvalue())
    return files


def by_pillow(content: bytes) -> Image.Image:
    """As timm's datasets read."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def sent(collated: Any) -> None:
    """Puts a batch where the main process finds it, as workers do with what they collate; what is there already stays."""
    for each in collated:
        if isinstance(each, Tensor):
            each.share_memory_()
        elif isinstance(each, tuple):
            sent(each)


def timms(prefetcher: bool) -> Any:
    """The recipe as timm's loader builds it."""
    aug, data = RECIPE.augmentation, RECIPE.data
    transform: Any = create_transform(
        data.img_size,
        is_training=True,
        use_prefetcher=prefetcher,
        scale=aug.crop_scale,
        hflip=aug.horizontal_flip,
        color_jitter=aug.color_jitter or None,
        auto_augment=aug.auto_augment,
        interpolation=aug.interpolation,
        mean=data.mean,
        std=data.std,
        re_prob=aug.random_erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for operation in augment_operations(step):
            if operation.name.startswith("Posterize"):
                _keep_one_bit(operation)
    return transform


def speed(files: list[bytes], views: int, rounds: int) -> dict[str, Any]:
    """Images a second and ratios of whole pipelines, from a file's bytes to a batch of `views` of each file in shared memory."""
    on_device = choose_augmentation(RECIPE.data, RECIPE.augmentation, RECIPE.run, CPU)
    assert isinstance(on_device, OnDevice)
    uint8, floats, ours, step = timms(True), timms(False), train_transform(RECIPE.data, RECIPE.augmentation), iter(range(10**9))

    def timm(transform: Any, collate: Callable[[Any], object]) -> None:
        sent(collate([(transform(by_pillow(content)), 0) for content in files * views]))

    def seeded(read: Callable[[bytes], Any], transform: Callable[[Any], Any]) -> None:
        items = []
        for content in files * views:
            image = read(content)
            with _seeded(next(step)):
                items.append(_Item(transform(image), 0, None))
        sent(_collate(items))

    arms: dict[str, Callable[[], None]] = {
        "timm, prefetcher": partial(timm, uint8, fast_collate),
        "timm, prefetcher, again": partial(timm, uint8, fast_collate),
        "timm, float32 from workers": partial(timm, floats, torch.utils.data.default_collate),
        "ours, all on the CPU": partial(seeded, decode_image, ours),
        "ours, workers' part of device": partial(seeded, decode, on_device.worker),
    }
    return compared(paired_rounds(arms, rounds), len(files) * views)


def compared(times: dict[str, list[float]], images: int) -> dict[str, Any]:
    """Of each arm: images a CPU second, and its speed as a multiple of the first arm's."""
    first = next(iter(times.values()))
    table = {}
    for name, seconds in times.items():
        middle, low, high = ratio(first, seconds)
        table[name] = {"images_per_second": images / median(seconds), "speed_up": middle, "interval": [low, high]}
        print(f"  {name:<32}{images / median(seconds):>9.0f} img/s{middle:>8.2f}  [{low:.2f}, {high:.2f}]", flush=True)
    return table


def collating(rounds: int, batch: int = 64) -> dict[str, Any]:
    """A batch of images of the recipe's size from what workers hold, to shared memory."""
    size, draw = RECIPE.data.img_size, np.random.default_rng(0)
    pixels = [torch.from_numpy(draw.integers(0, 256, (3, size, size), np.uint8)) for _ in range(batch)]
    plain = [(each.numpy(), 0) for each in pixels]
    floats = [_Item(each.float(), 0, None) for each in pixels]
    operations: list[tuple[str, Sequence[float]]] = [("bicubic", (1.0,) * 6), ("color", (1.5,))]
    drawn = [_Item(AugmentParams(each, operations, (1, 1, 50, 50), 0), 0, None) for each in pixels]
    mixed = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=1000)
    arms: dict[str, Callable[[], None]] = {
        "timm, fast_collate": lambda: sent(fast_collate(plain)),
        "timm, FastCollateMixup": lambda: sent(mixed(plain)),
        "ours, float32": lambda: sent(_collate(floats)),
        "ours, uint8 and plan": lambda: sent(_collate(drawn)),
    }
    return compared(paired_rounds(arms, rounds), batch)


def decoding(files: list[bytes], views: int, rounds: int) -> dict[str, Any]:
    arms: dict[str, Callable[[], Any]] = {
        name: partial(lambda read: [read(content) for content in files * views] and None, read)
        for name, read in (
            ("Pillow, to an image", by_pillow),
            ("Pillow, to a tensor", lambda c: as_pixels(by_pillow(c))),
            ("ours, to a tensor", decode),
        )
    }
    return compared(paired_rounds(arms, rounds), len(files) * views)


def levels(images: Tensor) -> Tensor:
    """Back from normalized images to gray levels."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (RECIPE.data.mean, RECIPE.data.std))
    return (images * std + mean) * 255


def parity(files: list[bytes]) -> dict[str, Any]:
    """How far the device's part is from Pillow and timm: decoding, crops, each operation, and all of it with the same seeds."""
    on_device, reference = (
        choose_augmentation(RECIPE.data, RECIPE.augmentation, RECIPE.run, CPU),
        train_transform(RECIPE.data, RECIPE.augmentation),
    )
    assert isinstance(on_device, OnDevice)
    images = [by_pillow(content) for content in files]
    equal = all(
        np.array_equal(np.asarray(image), decode(content).permute(1, 2, 0).numpy())
        for image, content in zip(images, files, strict=True)
    )
    table: dict[str, Any] = {"decode": {"equal": equal}}
    theirs, drawn, crops = [], [], []
    for seed, image in enumerate(images * 2):
        with _seeded(seed):
            theirs.append(reference(image))  # type: ignore[arg-type]
        with _seeded(seed):
            drawn.append(on_device.worker(as_pixels(image)))
        with _seeded(seed):
            crops.append(as_pixels(reference.transforms[1](reference.transforms[0](image))))  # type: ignore[attr-defined]
    ours = torch.stack([cast(Tensor, each.image) for each in drawn])
    error = (ours.double() - torch.stack(crops).double()).square().mean((1, 2, 3)).clamp(min=1e-9)
    decibel = 10 * torch.log10(255**2 / error)
    table["crop"] = {"psnr_mean": decibel.mean().item(), "psnr_min": decibel.min().item()}
    difference = (levels(on_device.finish(ours, make_plan(drawn))) - levels(torch.stack(theirs))).abs()
    kept = [number for number, each in enumerate(drawn) if each.box is None]  # erased boxes hold other noise
    table["whole recipe"] = {"mean": difference[kept].mean().item()}
    squares = [image.resize((RECIPE.data.img_size,) * 2) for image in images]
    for operation in augment_operations(reference.transforms[2]):  # type: ignore[attr-defined]
        table[operation.name] = one(operation, squares, on_device)
    for name, values in table.items():
        print(f"  {name:<24}" + "  ".join(f"{key} {value:.6g}" for key, value in values.items()), flush=True)
    return table


def one(operation: AugmentOp, squares: list[Image.Image], on_device: OnDevice) -> dict[str, float]:
    """Largest difference in gray levels, and the share of values that differ at all, at magnitudes drawn from [0, 10]."""
    number = next(n for n, step in enumerate(on_device.worker.colors) if augment_operations(step))
    recorder = next(each for each in augment_operations(on_device.worker.colors[number]) if each.name == operation.name)
    theirs, drawn = [], []
    for each in (operation, recorder):
        each.prob, each.magnitude, each.magnitude_std = 1.0, 10, float("inf")
    for seed, image in enumerate(squares):
        with _seeded(seed):
            theirs.append(as_pixels(operation(image)))
        with _seeded(seed):
            drawn.append(AugmentParams(as_pixels(image), recorder([]), None, 0))
    cropped = torch.stack([cast(Tensor, each.image) for each in drawn])
    ours = levels(on_device.finish(cropped, make_plan(drawn)))
    difference = (ours - torch.stack(theirs)).abs().round()
    return {"max": difference.max().item(), "share": (difference > 0).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size of files and few rounds, for a minute")
    parser.add_argument("--rounds", type=int, help="default 25, with --quick 7")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed_data.json")
    options = parser.parse_args()
    rounds, views = options.rounds or (7 if options.quick else 25), 1 if options.quick else 2
    torch.set_num_threads(1)
    worker: Any = torch.utils.data._utils.worker
    worker._worker_info = object()  # as in a worker, where no streams are put back after seeding
    results: dict[str, Any] = {}
    for name, settings in SIZES.items():
        if options.quick and results:
            break
        files = photos(*settings)
        print(f"{name}, {sum(map(len, files)) / len(files) / 1000:.0f} KB: whole pipelines", flush=True)
        pipelines = speed(files, views, rounds)
        print(f"{name}: decoding alone")
        results[name] = {"pipelines": pipelines, "decoding": decoding(files, views, rounds)}
    print("collating a batch of 64")
    results["collate"] = collating(rounds)
    print("parity; in gray levels where nothing else is said")
    results["parity"] = parity(photos(*SIZES["500x375 q90"]))
    command = "python benchmarks/data.py" + (" --quick" if options.quick else "")
    options.output.write_text(json.dumps({"command": command, **facts(), "rounds": rounds, "results": results}, indent=2) + "\n")
    control = results["500x375 q90"]["pipelines"]["timm, prefetcher, again"]["speed_up"]
    print(f"{options.output}; timm against itself {control:.3f}{'' if abs(control - 1) < 0.03 else ': the machine was too busy'}")


if __name__ == "__main__":
    main()
