"""What whole loaders deliver: images a second of timm's loader and of ours in both modes, with 0, 1, 2 ... workers.

    python benchmarks/loader.py [--quick] [--workers 0 1 2 16] [--batch 256]

Real photos as JPEGs of 500x375 pixels in a folder, the recipe deit_ti without mixing; every loader is read through once before it is timed, then in
random order in each round, by the clock. On a GPU batches are what a step sees there: moved, normalized, augmented. Without one the device's
part (normalizing and erasing; of ours RandAugment too) is left out, and what counts is what workers, queues and collating deliver; only
"ours, cpu" does all of it anyway. Writes results/speed_loader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.data import SIZES, photos
from benchmarks.paired import facts
from deit_kd import recipe as recipes
from deit_kd.data import LoaderConfig, TrainLoader, open_source
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.data.transforms import _keep_one_bit, augment_operations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = [f"augmentation.{key}=0" for key in ("mixup", "cutmix")]


def fill(root: Path, images: int) -> None:
    """ROOT/train/CLASS/ with so many files, and a file to validate on, in ten classes."""
    files = photos(*SIZES["500x375 q90"])
    for split, number in (("train", images), ("val", 10)):
        for index in range(number):
            folder = root / split / str(index % 10)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.jpg").write_bytes(files[index % len(files)])


def timms(root: Path, batch: int, workers: int, mixes: bool) -> Callable[[], Iterable[Any]]:
    """Its loader with its prefetcher, as train.py of timm makes it; with mixing, which it does in the collation."""
    recipe = recipes.load("deit_ti")
    aug, data = recipe.augmentation, recipe.data
    loader: Any = create_loader(
        create_dataset("", str(root), split="train"),
        data.img_size,
        batch,
        is_training=True,
        re_prob=aug.random_erasing,
        re_mode="pixel",
        scale=aug.crop_scale,
        hflip=aug.horizontal_flip,
        color_jitter=aug.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=aug.auto_augment,
        interpolation=aug.interpolation,
        mean=data.mean,
        std=data.std,
        num_workers=workers,
        collate_fn=FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=1000) if mixes else None,
        pin_memory=DEVICE.type == "cuda",
        device=DEVICE,
        persistent_workers=workers > 0,
    )
    for step in loader.dataset.transform.transforms:
        for operation in augment_operations(step):
            if operation.name.startswith("Posterize"):
                _keep_one_bit(operation)  # else Pillow 13 would end the pass now and then
    return lambda: loader if DEVICE.type == "cuda" else loader.loader


def ours(root: Path, batch: int, workers: int, mode: str, decodes: str = "workers") -> Callable[[], Iterable[Any]]:
    recipe = recipes.load("deit_ti", [*SETTINGS, f"run.augment_on={mode}", f"run.decode_on={decodes}"])
    loader = TrainLoader(
        open_source("image_folder", root, "train"),
        choose_augmentation(recipe.data, recipe.augmentation, recipe.run, DEVICE),
        recipe.augmentation,
        LoaderConfig(DEVICE, 1, 0, workers, "refuse", print),
        num_classes=10,
        seed=0,
        global_batch_size=batch,
        accumulation_steps=1,
    )
    if DEVICE.type != "cuda" and mode == "device" and decodes == "workers":
        loader._finish = lambda images, _: images  # type: ignore[assignment]
    epochs = count()
    return lambda: loader.epoch(next(epochs))


def seconds(read: Callable[[], Iterable[Any]]) -> float:
    started = time.perf_counter()
    for _ in read():
        pass
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(root: Path, images: int, batch: int, decoded: bool, workers: int, rounds: int) -> dict[str, Any]:
    """Of each loader: images a second, and its speed as a multiple of timm's, medians over rounds."""
    arms = {
        "timm": timms(root, batch, workers, mixes=False),
        "timm, again": timms(root, batch, workers, mixes=False),
        "timm, mixing": timms(root, batch, workers, mixes=True),
        "ours, cpu": ours(root, batch, workers, "cpu"),
        "ours, device": ours(root, batch, workers, "device"),
    }
    if DEVICE.type == "cuda" or decoded:
        arms["ours, decoded there"] = ours(root, batch, workers, "device", "device")
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in tqdm(range(rounds + 1), f"{workers} workers", delay=2, disable=None):
        for name in random.Random(number).sample(list(arms), len(arms)):
            taken = seconds(arms[name])
            if number:  # the first starts workers
                times[name].append(taken)
    table = {}
    for name, each in times.items():
        ratios = [a / b for a, b in zip(times["timm"], each, strict=True)]
        table[name] = {"images_per_second": images / median(each), "speed_up": median(ratios), "range": [min(ratios), max(ratios)]}
        print(f"{workers} workers  {name:<20}{images / median(each):>9.0f} img/s{median(ratios):>8.2f}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and rounds, for a minute")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({0, 1, min(16, os.cpu_count() or 1)}))
    parser.add_argument(
        "--decoded", action="store_true", help="run.decode_on=device without a GPU too, with all that the device does"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, help="default 1024, with --quick 128")
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 2")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed_loader.json")
    options = parser.parse_args()
    images, rounds = options.images or (128 if options.quick else 1024), options.rounds or (2 if options.quick else 7)
    batch = min(options.batch, images)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), images)
        measure_here = partial(measure, Path(folder), images // batch * batch, batch, options.decoded)
        results = {f"{workers} workers": measure_here(workers, rounds) for workers in options.workers}
    told = {"workers": " ".join(map(str, options.workers)), "batch": batch, "images": images, "rounds": rounds}
    command = (
        "python benchmarks/loader.py "
        + " ".join(f"--{name} {value}" for name, value in told.items())
        + " --decoded" * options.decoded
    )
    content = {"command": command, **facts(), "results": results}
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
