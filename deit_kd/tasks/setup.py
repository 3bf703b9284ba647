"""The parts of a task, built from a recipe: loaders, the distiller, and the terms of each teacher; and what run.json says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from deit_kd.data import EvaluationLoader, Source, TrainLoader
from deit_kd.data.build import accumulation, loader_config
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.data.sources.base import split_holdout
from deit_kd.data.transforms import evaluation_transform
from deit_kd.distributed.batch_norm import synchronize_batch_norms
from deit_kd.distributed.global_batch import GlobalBatch
from deit_kd.errors import UserError
from deit_kd.models import AnyTeacher, Distiller
from deit_kd.models.build import build_distiller, head_indices
from deit_kd.models.features import TimmModel
from deit_kd.recipe import Recipe
from deit_kd.seed import derive_seed
from deit_kd.tasks.distillation import TeacherTerms
from deit_kd.teacher_cache import identity
from deit_kd.teacher_cache.class_means import stated_means

FEW = 64  # images of a micro-batch below which the host of a GPU is likely to launch kernels more slowly than the GPU runs them
FEW_IMAGES = (
    "give each GPU more images (fewer GPUs, or a larger global_batch_size: published runs have 256 to 1024, and optim.lr_rule scales the "
    "learning rate), or launch fewer kernels by run.compile=true"
)


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
    train, val = sources
    tune, holdout = recipe.finetune, None
    if tune is not None and tune.holdout:
        train, holdout = split_holdout(train, tune.holdout, derive_seed(recipe.seed, "holdout"))
    if len(val) < accelerator.num_processes:
        raise UserError(f"{val.origin}: {len(val)} validation images are fewer than the {accelerator.num_processes} processes")
    cache = next((teacher.cache for teacher in teachers if teacher.cache), None)
    steps = accumulation(recipe.global_batch_size, accelerator.num_processes, device_batch_size)
    here = loader_config(recipe.data, recipe.run, accelerator, warn)
    loader = TrainLoader(
        train,
        choose_augmentation(recipe.data, recipe.augmentation, recipe.run, accelerator.device),
        recipe.augmentation,
        here,
        num_classes=len(train.class_names),
        seed=recipe.seed,
        global_batch_size=recipe.global_batch_size,
        accumulation_steps=steps,
        memory=cache,
    )
    if cache is not None:
        stated, share = recipe.distillations()[0].teacher, tune.holdout if tune else 0.0
        wanted = identity.cache_identity(stated, recipe.data, loader, share, accelerator.mixed_precision)
        identity.check_identity(cache, wanted, warn)
    micro = loader.micro_batch_size
    if accelerator.device.type == "cuda" and micro < FEW and accelerator.num_processes > 1:
        warn(
            f"each GPU has {micro} images at a time, so few that it may wait for its host; {FEW_IMAGES}; deit-kd plan says what that costs"
        )
    if micro < 2 and any(distillation.distill.feature_weight for distillation in recipe.distillations()):
        raise UserError(f"global_batch_size={recipe.global_batch_size}: leaves {micro} image a micro-batch, feature losses need 2")
    transform = evaluation_transform(recipe.data, recipe.evaluation)
    held = None if holdout is None else EvaluationLoader(holdout, transform, here, batch_size=micro)
    return Loaders(loader, EvaluationLoader(val, transform, here, batch_size=micro), held)


def make_distiller(
    recipe: Recipe,
    num_classes: int,
    teachers: Sequence[AnyTeacher],
    labels: np.ndarray,
    accelerator: Accelerator,
    compiled: str | None,
) -> Distiller:
    """Student and projectors as a run trains them: with batch norms over all processes, and compiled if that is wanted.

    Args:
        recipe: names them.
        num_classes: of the data.
        teachers: one a distillation.
        labels: [N] int of the training images.
        accelerator: says where, and among how many processes.
        compiled: torch.compile's mode; None for none.

    Raises:
        UserError: see `build_distiller`.
    """
    distiller = build_distiller(recipe, num_classes, teachers, torch.from_numpy(labels))
    if recipe.batch_statistics == "global" and accelerator.num_processes > 1:
        synchronize_batch_norms(distiller)
    if compiled:
        distiller.compile_forward(compiled)
    return distiller


def make_teacher_terms(
    recipe: Recipe,
    distiller: Distiller,
    teachers: Sequence[AnyTeacher],
    loader: TrainLoader,
    output: Path,
    accelerator: Accelerator,
    compiled: str | None,
) -> tuple[list[TeacherTerms], GlobalBatch]:
    """The terms of each teacher, and the global batch that they share.

    Args:
        recipe: states weights, losses and class means.
        distiller: says how many distillation heads there are.
        teachers: one a distillation.
        loader: of the training images.
        output: the run folder, where computed class means are kept.
        accelerator: of this process.
        compiled: torch.compile's mode for losses; None for none.

    Raises:
        UserError: CUDA graphs while micro-batches accumulate; see also `stated_means`.
    """
    if compiled in ("reduce-overhead", "max-autotune") and loader.accumulation_steps > 1:
        raise UserError(
            f"run.compile={compiled}: its CUDA graphs write over gradients that micro-batches accumulate; use run.compile=true, with "
            f"run.compile_teacher={compiled} for the teacher alone, or leave out --device-batch-size"
        )
    global_batch = GlobalBatch(accelerator, loader.accumulation_steps)
    images = (recipe.data, recipe.augmentation, loader.source, accelerator, loader.loader_config, recipe.global_batch_size)
    distillations, terms = recipe.distillations(), []
    for number, head_index in enumerate(head_indices(distillations, distiller.distillation_heads)):
        stated, teacher = distillations[number].distill, teachers[number]
        terms.append(
            TeacherTerms(
                stated,
                number,
                head_index or 0,
                teacher,
                stated_means(output, *images, stated, teacher),
                global_batch,
                epochs=recipe.epochs,
                seed=recipe.seed,
                sees_global_batch=recipe.batch_statistics == "global",
                compiled=compiled,
            )
        )
    return terms, global_batch


def run_facts(
    recipe: Recipe, student: TimmModel, teachers: Sequence[AnyTeacher], train: TrainLoader, val: Source, held_out: int
) -> dict[str, Any]:
    """What run.json says of data, layout and teachers.

    Args:
        recipe: of the run.
        student: whose license counts, if it was trained before.
        teachers: one a distillation.
        train: the loader of the training images.
        val: the validation images.
        held_out: how many training images are held out.
    """
    license = student.pretrained_cfg.get("license") or "unknown"
    return {
        "augmented_on": train.augments_on,
        "decoded_on": train.decodes_on,
        "accumulation_steps": train.accumulation_steps,
        "micro_batch_size": train.micro_batch_size,
        "global_batch_size": train.global_batch_size,
        "data": {
            "name": val.name,
            "train_images": len(train.source),
            "val_images": len(val),
            "num_classes": len(train.source.class_names),
        },
        "finetuned_from": {"license": license} if recipe.finetune else None,
        "held_out_images": held_out,
        "teachers": [
            {
                **teacher.info.facts(),
                "img_size": teacher.img_size or recipe.data.img_size,
                "cache": teacher.cache and teacher.cache.facts(),
            }
            for teacher in dict.fromkeys(teachers)
        ],
    }
