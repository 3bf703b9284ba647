"""What is measured of teachers and student beside the terms of a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deit_kd.data import EvaluationLoader
from deit_kd.distributed import fsdp
from deit_kd.errors import UserError
from deit_kd.evaluation.metrics import measure
from deit_kd.models import AnyTeacher, CachedTeacher, build_student
from deit_kd.models.features import TimmModel
from deit_kd.models.projectors.vectors import first_matrix
from deit_kd.recipe import Recipe
from deit_kd.teacher_cache import identity


def in_one_piece(student: nn.Module, recipe: Recipe, num_classes: int, device: torch.device) -> TimmModel:
    """The student, or its EMA; of one that FSDP cuts over processes a whole copy, on every process."""
    if not fsdp.is_sharded(student):
        return cast(TimmModel, student)
    copy = build_student(recipe.student, num_classes, recipe.data.img_size)
    copy.load_state_dict(fsdp.gather(student.state_dict()))
    return copy.to(device)


@torch.no_grad()  # a compiled teacher sees the kind of tensors that it sees in training
def measure_teachers(
    teachers: Sequence[AnyTeacher],
    distills_logits: Sequence[bool],
    recipe: Recipe,
    loader: EvaluationLoader,
    accelerator: Accelerator,
) -> dict[str, float]:
    """top1 and top5 over the validation images of each teacher that knows their labels.

    Raises:
        UserError: logits that are not finite.
    """
    metrics: dict[str, float] = {}
    for number, teacher in enumerate(dict.fromkeys(teachers)):
        if isinstance(teacher, CachedTeacher):  # it was measured when it was cached, on what was then evaluated
            same = teacher.manifest["validation"] == identity.of_validation(recipe.data, recipe.evaluation, loader.source)
            metrics |= teacher.manifest["accuracy"] if same else {}
        elif distills_logits[teachers.index(teacher)]:
            overflown = torch.zeros(1, device=accelerator.device)
            logits = partial(_teacher_logits, teacher, overflown)
            metrics |= measure(logits, loader, accelerator, f"teacher_{number}_" if number else "teacher_")
            if accelerator.reduce(overflown).item():  # in any process
                raise UserError(
                    f"teacher {teacher.info.name}: logits of validation images are not finite in {teacher.dtype}; "
                    "set teacher.precision=float32"
                )
    return metrics


@torch.no_grad()
def spectrum(projector: nn.Module) -> dict[str, Any]:
    """A projector's norm, its singular values, and its effective rank exp(entropy of their shares): a collapse shows at once."""
    weight = first_matrix(projector)
    if weight is None or not weight.isfinite().all():
        return {}
    (weight,) = fsdp.gather({"": weight}).values()
    values = torch.linalg.svdvals(weight.float())
    share = values / values.sum()
    rank = torch.special.entr(share).sum().exp()
    return {"projector_norm": values.norm().item(), "effective_rank": rank.item(), "singular_values": values.tolist()}


def _teacher_logits(teacher: AnyTeacher, overflown: Tensor, images: Tensor) -> dict[str, Tensor]:
    logits = teacher(images).logits
    overflown += (~logits.isfinite()).any()
    return {"": logits}
