"""The sections of a recipe that functions take together."""

from __future__ import annotations

from typing import Any

from deit_kd.recipe import Augmentation, Data, Distill, Evaluation, Finetune, Optim, Recipe, Run, Student


def augmenting(recipe: Recipe) -> tuple[Data, Augmentation, Run]:
    """Of `choose_augmentation`."""
    return recipe.data, recipe.augmentation, recipe.run


def training(recipe: Recipe) -> tuple[Data, Augmentation]:
    """Of `train_transform`."""
    return recipe.data, recipe.augmentation


def evaluating(recipe: Recipe) -> tuple[Data, Evaluation]:
    """Of `evaluation_transform`."""
    return recipe.data, recipe.evaluation


def scheduling(recipe: Recipe) -> tuple[Optim, float, int]:
    """Of `build_schedule`."""
    return recipe.optim, recipe.lr_factor(), recipe.epochs


def optimizing(recipe: Recipe) -> tuple[Optim, Finetune | None, float]:
    """Of `build_optimizer`."""
    return recipe.optim, recipe.finetune, recipe.lr_factor()


def citing(recipe: Recipe) -> tuple[list[Distill], float, str]:
    """Of `cited`."""
    return [each.distill for each in recipe.distillations()], recipe.label_weight, recipe.student.name


def naming(recipe: Recipe) -> tuple[Student, int]:
    """Of `student_in_words`."""
    return recipe.student, recipe.data.img_size


def described(recipe: Recipe) -> dict[str, Any]:
    """Of `summary.describe`."""
    return {
        "student_name": recipe.student.name,
        "teachers": [distillation.teacher for distillation in recipe.distillations()],
        "epochs": recipe.epochs,
        "global_batch_size": recipe.global_batch_size,
        "optim": recipe.optim,
        "lr_factor": recipe.lr_factor(),
        "keep_checkpoints": recipe.run.keep_checkpoints,
    }
