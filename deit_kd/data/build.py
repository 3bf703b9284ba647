"""A recipe's data, opened: the images of both splits, how loaders of a process are set up, and how a global batch is cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from deit_kd.data import LoaderConfig, Source, open_source
from deit_kd.data.sources.base import turned
from deit_kd.data.transforms import evaluation_transform
from deit_kd.data.workers import cores
from deit_kd.errors import UserError
from deit_kd.files.warn import warn
from deit_kd.recipe import Data, Evaluation, Run
from deit_kd.text import for_terminal

BAD_IMAGE = (
    "remove it, or set data.on_bad_image=skip; a run that goes on also needs --accept-changes data.on_bad_image,training_images"
)


def open_data(wanted: Data, data: Path | None) -> tuple[Source, Source]:
    """(train, val) of a recipe.

    Args:
        wanted: the section `data`.
        data: the folder of --data.

    Raises:
        UserError: the data are missing or empty, or are not what the recipe states.
    """
    upright = wanted.exif_orientation == "apply"
    train, val = (
        open_source(wanted.source, data, split, upright=upright, label_column=wanted.label_column) for split in ("train", "val")
    )
    if not train.upright and (count := turned(train)):
        warn(
            f"{train.origin}: {count} of {min(64, len(train))} images carry an EXIF orientation, and are read as they are stored; set "
            "data.exif_orientation=apply to turn them as viewers do"
        )
    stated = wanted.num_classes
    if stated not in ("auto", len(train.class_names)):
        raise UserError(
            f"{train.origin}: has {len(train.class_names)} classes, the recipe says data.num_classes={stated}; "
            f"set data.num_classes={len(train.class_names)} or give other data"
        )
    if wanted.train_images not in ("auto", len(train)):
        raise UserError(
            f"{train.origin}: has {len(train)} training images, the recipe says data.train_images={wanted.train_images}; "
            "pass --data DIR of the whole set, or set data.train_images=auto"
        )
    _warn_of_empty_classes(train, val)
    return train, val


def _warn_of_empty_classes(train: Source, val: Source) -> None:
    """Warns of each split that has no image of a class which it should have."""
    trained, measured = (set(np.unique(source.labels).tolist()) for source in (train, val))
    untrained = [name for label, name in enumerate(train.class_names) if label not in trained]
    unmeasured = [name for label, name in enumerate(train.class_names) if label in trained - measured]
    for source, what, names in ((train, "training", untrained), (val, "validation", unmeasured)):
        if names:
            some = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
            warn(
                f"{source.origin}: no {what} image of {len(names):,} of the {len(train.class_names):,} classes ({for_terminal(some)})"
            )


def example_images(source: Source, data: Data, evaluation: Evaluation, count: int = 4) -> Tensor:
    """The first readable images [count,3,H,W], transformed as in evaluation.

    Raises:
        UserError: none can be read.
    """
    transform, images = evaluation_transform(data, evaluation), []
    for index in range(min(len(source), 100)):
        try:
            images.append(transform(source[index][0]))
        except Exception:  # PIL raises many types for broken files; the loaders report them
            continue
        if len(images) == count:
            break
    if not images:
        raise UserError(f"{source.origin}: none of its first images can be read; mend them, or give other data")
    return torch.stack(images)


def loader_config(data: Data, run: Run, accelerator: Accelerator, warn: Callable[[str], None]) -> LoaderConfig:
    """Where this process's loaders work, and with how many workers."""
    stated = run.workers
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))  # the launcher sets it
    return LoaderConfig(
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        workers=min(16, cores() // on_this_machine) if stated == "auto" else stated,
        on_bad_image=data.on_bad_image,
        warn=warn,
        remedy=BAD_IMAGE,
    )


def accumulation(global_batch_size: int, num_processes: int, device_batch_size: int | None) -> int:
    """The number of micro-batches in an optimizer step of a process; none is larger than `device_batch_size`.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    if global_batch_size % num_processes:
        raise UserError(f"global_batch_size={global_batch_size} does not divide over {num_processes} processes; change one of them")
    share = global_batch_size // num_processes
    if device_batch_size is None or device_batch_size >= share:
        return 1
    if device_batch_size < 1 or share % device_batch_size:
        divisors = [n for n in range(1, share) if share % n == 0 and n <= max(device_batch_size, 1)]
        raise UserError(
            f"--device-batch-size {device_batch_size} does not divide the {share} images of a process "
            f"(global_batch_size {global_batch_size} over {num_processes}); use {divisors[-1]}"
        )
    return share // device_batch_size
