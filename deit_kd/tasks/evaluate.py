"""Evaluation of student, EMA and teachers while a run trains, and the projector's spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from deit_kd.data import EvaluationLoader
from deit_kd.distributed import fsdp
from deit_kd.errors import UserError
from deit_kd.evaluation.metrics import measure, measure_student
from deit_kd.models import AnyTeacher, Distiller, Teacher, build_student
from deit_kd.models.features import TimmModel
from deit_kd.models.projectors.vectors import first_matrix
from deit_kd.recipe import Data, Evaluation, Student
from deit_kd.teacher_cache import identity


def unsharded(student: nn.Module, stated: Student, num_classes: int, img_size: int, device: torch.device) -> TimmModel:
    """The student or its EMA; if FSDP cuts it over processes, a whole copy on every process."""
    if not fsdp.is_sharded(student):
        return cast(TimmModel, student)
    copy = build_student(stated, num_classes, img_size)
    copy.load_state_dict(fsdp.gather(student.state_dict()))
    return copy.to(device)


class StudentEvaluation:
    """Evaluates the student and its EMA over the validation images and those that are held out.

    Args:
        distiller: the student with its projectors.
        val: the validation images.
        holdout: training images that are held out; None for none.
        unsharded: gives the student or its EMA in one piece, see the function.
        accelerator: of this process.
        compiled: torch.compile's mode; None for none.
    """

    def __init__(
        self,
        distiller: Distiller,
        val: EvaluationLoader,
        holdout: EvaluationLoader | None,
        unsharded: Callable[[nn.Module], TimmModel],
        accelerator: Accelerator,
        compiled: str | None,
    ):
        self.distiller, self.val, self.holdout, self.unsharded = distiller, val, holdout, unsharded
        self.accelerator, self.compiled = accelerator, compiled
        self._averaged: Distiller | None = None

    @torch.no_grad()
    def __call__(self, ema: nn.Module | None) -> dict[str, float]:
        """top1 and top5 in percent and nll of the mean of the heads, and each head's top1, over every image once."""
        sharded = fsdp.is_sharded(self.distiller.student)
        distiller = Distiller(self.unsharded(self.distiller.student)) if sharded else self.distiller
        ema = None if ema is None else self.unsharded(ema)
        if self.accelerator.num_processes > 1:  # each process has its own running statistics; the first one's are exported
            for model in (distiller, ema) if ema is not None else (distiller,):
                for buffer in model.buffers():
                    buffer.copy_(broadcast(buffer))
        metrics = measure_student(distiller, self.val, self.accelerator)
        if self.holdout:
            metrics |= measure_student(distiller, self.holdout, self.accelerator, "holdout_")
        if ema is not None:
            if self._averaged is None or self._averaged.student is not ema:
                self._averaged = Distiller(ema)
                if self.compiled:
                    self._averaged.compile_forward(self.compiled)
            metrics |= measure_student(self._averaged, self.val, self.accelerator, "ema_")
        return metrics


@torch.no_grad()  # a compiled teacher sees the kind of tensors that it sees in training
def measure_teachers(
    teachers: Sequence[AnyTeacher],
    distills_logits: Sequence[bool],
    view: tuple[Data, Evaluation],
    loader: EvaluationLoader,
    accelerator: Accelerator,
) -> dict[str, float]:
    """top1 and top5 over the validation images of each teacher whose logits are compared.

    Args:
        teachers: one a distillation.
        distills_logits: of each, whether its logits are compared.
        view: the recipe's sections of the validation images.
        loader: of the validation images.
        accelerator: of this process.

    Raises:
        UserError: logits that are not finite.
    """
    metrics: dict[str, float] = {}
    for number, teacher in enumerate(dict.fromkeys(teachers)):
        if teacher.cache:  # it was evaluated when it was cached
            same = teacher.cache.manifest["validation"] == identity.of_validation(*view, loader.source)
            metrics |= teacher.cache.manifest["accuracy"] if same else {}
        elif teacher.live and distills_logits[teachers.index(teacher)]:
            overflown = torch.zeros(1, device=accelerator.device)
            logits = partial(_teacher_logits, teacher.live, overflown)
            metrics |= measure(logits, loader, accelerator, f"teacher_{number}_" if number else "teacher_")
            if accelerator.reduce(overflown).item():  # in any process
                raise UserError(
                    f"teacher {teacher.info.name}: logits of validation images are not finite in {teacher.live.dtype}; "
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


def _teacher_logits(teacher: Teacher, overflown: Tensor, images: Tensor) -> dict[str, Tensor]:
    logits = teacher(images).logits
    overflown += (~logits.isfinite()).any()
    return {"": logits}
