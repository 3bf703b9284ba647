"""The parts of a task, built from a recipe: loaders, the distiller, and the terms of each teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from deit_kd.data import EvaluationLoader, Source, TrainLoader
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.data.sources.base import split_holdout
from deit_kd.data.transforms import evaluation_transform
from deit_kd.distributed.global_batch import GlobalBatch
from deit_kd.errors import UserError
from deit_kd.models import AnyTeacher, Distiller, build
from deit_kd.recipe import Distillation, Recipe
from deit_kd.seed import derive_seed
from deit_kd.tasks.distillation import Terms
from deit_kd.teacher_cache import class_means, identity


class Loaders(NamedTuple):
    """The loaders of a run; `holdout` is of the images that fine-tuning holds out."""

    train: TrainLoader
    val: EvaluationLoader
    holdout: EvaluationLoader | None


def make_loaders(
    recipe: Recipe,
    accelerator: Accelerator,
    sources: tuple[Source, Source],
    device_batch_size: int | None,
    warn: Callable[[str], None],
    teachers: Sequence[AnyTeacher] = (),
) -> Loaders:
    """The loaders of this process.

    Args:
        recipe: what is trained.
        accelerator: says where, and among how many processes.
        sources: train and val.
        device_batch_size: the largest micro-batch of one device; None for no accumulation.
        warn: takes a line for people.
        teachers: of whose caches batches hold the answers.

    Raises:
        UserError: a batch that does not divide or has too few images, too few images, or a cache of other images.
    """
