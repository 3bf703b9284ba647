"""The stream of images and targets of an epoch, as hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from deit_kd import recipe as recipes
from deit_kd.data import LoaderConfig, TrainLoader, open_source
from deit_kd.data.on_device.augment import choose_augmentation

CPU = torch.device("cpu")


HEAVY = [
    "augmentation.auto_augment=rand-m9-mstd0.5-inc1",
    "augmentation.random_erasing=0.5",
    "augmentation.mixup=0.8",
    "augmentation.cutmix=1.0",
    "augmentation.mixup_prob=1.0",
    "augmentation.mixup_switch_prob=0.5",
]


def train_loader(
    folder: Path,
    processes: int = 1,
    process: int = 0,
    accumulation: int = 1,
    workers: int = 0,
    bad: str = "refuse",
    source: str = "image_folder",
    on: str = "cpu",
) -> TrainLoader:
    recipe = recipes.load("quickstart", [*HEAVY, f"run.augment_on={on}"])
    return TrainLoader(
        open_source(source, folder, "train"),
        choose_augmentation(recipe.data, recipe.augmentation, recipe.run, CPU),
        recipe.augmentation,
        LoaderConfig(CPU, processes, process, workers, bad, print),
        num_classes=10,
        seed=5,
        global_batch_size=24,
        accumulation_steps=accumulation,
    )


def stream(
    folder: Path, epoch: int, start: int = 0, source: str = "image_folder", on: str = "cpu", **layout: int
) -> set[tuple[str, str]]:
    """Hashes of all (image, target) pairs of an epoch, over all processes of a layout."""
    seen = []
    for process in range(layout.get("processes", 1)):
        for batch in train_loader(folder, process=process, source=source, on=on, **layout).epoch(epoch, start):
            for image, target in zip(batch.images, batch.targets, strict=True):
                seen.append((hashlib.sha1(image.numpy().tobytes()).hexdigest(), hashlib.sha1(target.numpy().tobytes()).hexdigest()))
    assert len(set(seen)) == len(seen)
    return set(seen)
