"""The one prepared module: student and projectors behind one forward, so that DDP and FSDP see every gradient.

Calling a part past the wrapper (as published codes of this family do) silently leaves its gradients unsynchronized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from deit_kd.errors import UserError
from deit_kd.models.features import (
    Intermediates,
    Tap,
    Tapped,
    TimmModel,
    classifiers,
    forward_with_intermediates,
    head_logits,
    select_feature,
    stages_of,
    wrong_size,
)
from deit_kd.models.projectors.contrastive_memory import ContrastiveMemory
from deit_kd.models.projectors.review_fusion import ReviewFusion
from deit_kd.models.projectors.vectors import Orthonormal, build_projector
from deit_kd.models.teacher import AnyTeacher
from deit_kd.recipe import Distillation, Projector
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES


class StudentOutput(NamedTuple):
    """B batch, K classes, E teacher width."""

    logits: Tensor  # [B,K], class-token head; of a CNN, its only head
    dist_logits: tuple[Tensor, ...]  # [B,K] of the head of each distillation token
    projected: tuple[
        Tapped | None, ...
    ]  # of each distillation, the student's features in the teacher's width; None: it compares none

    def prediction(self) -> Tensor:
        """[B,K]: what the exported student returns, the mean of its heads, which is taken in float32 at least."""
        heads = (self.logits, *self.dist_logits)
        if len(heads) == 1:
            return self.logits
        return torch.stack([head if head.dtype == torch.float64 else head.float() for head in heads]).mean(dim=0)


class Distiller(nn.Module):
    """A timm student and a projector for each distillation.

    Args:
        student: a timm model; a distilled DeiT gives logits from each of its prefix tokens.
        projectors: one a distillation.
        taps: of the student, one a distillation; None for a distillation that compares logits only.
    """

    def __init__(self, student: TimmModel, projectors: Sequence[nn.Module] = (), taps: Sequence[Tap | None] = ()):
        super().__init__()
        self.student: TimmModel = student
        self.projectors = nn.ModuleList(projectors)
        self.taps = tuple(taps)
        self.stages = stages_of(student, [tap for tap in taps if tap is not None])
        self.distillation_heads = len(classifiers(student)) - 1

    def forward(self, images: Tensor, teachers: Sequence[Tapped | None] = ()) -> StudentOutput:
        """The student, and with `teachers` its projections.

        Args:
            images: [B,3,H,W], normalized as the student wants them.
            teachers: what each distillation's teacher gave at its tap; None leaves that distillation out. Nothing at all: logits only.
        """
        return self._compute(images, teachers)

    def compile_forward(self, mode: str) -> None:
        """Compiles `forward`, for each shape of images that comes; names of parameters stay."""
        self._compute = torch.compile(self._compute, dynamic=False, mode=mode)  # type: ignore[method-assign]

    def _compute(self, images: Tensor, teachers: Sequence[Tapped | None]) -> StudentOutput:
        student = self.student
        hidden = forward_with_intermediates(student, images, self.stages if teachers else [])
        logits, *dist_logits = head_logits(student, hidden.final)
        projected: list[Tapped | None] = [None] * len(teachers)
        for number, (projector, tap, teacher) in enumerate(zip(self.projectors, self.taps, teachers, strict=bool(teachers))):
            if tap is not None and teacher is not None:
                projected[number] = project(projector, select_feature(student, hidden, tap), teacher)
        return StudentOutput(logits, tuple(dist_logits), tuple(projected))

    def train(self, mode: bool = True) -> Distiller:
        """Batch norms that are frozen keep their running statistics, too."""
        super().train(mode)
        for each in self.student.modules():
            own = list(each.parameters()) if isinstance(each, nn.modules.batchnorm._BatchNorm) else []
            if own and not any(parameter.requires_grad for parameter in own):
                each.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Timm's list of the student, under its names here (else position embedding and tokens would decay), and constrained weights."""
        listed: set[str] = getattr(self.student, "no_weight_decay", set)()
        constrained = {f"projectors.{n}.weight" for n, each in enumerate(self.projectors) if isinstance(each, Orthonormal)}
        return {f"student.{name}" for name in listed} | constrained


def project(projector: nn.Module, features: Tapped, teacher: Tapped) -> Tapped:
    """The student's features in the teacher's width; a projector of vectors acts on the channels at each place of a map [B,D,H,W]."""
    if isinstance(projector, ReviewFusion):
        return projector(features, [(level.shape[2], level.shape[3]) for level in teacher])
    if isinstance(projector, ContrastiveMemory):
        return list(projector(features, teacher))  # the teacher's embedding is trained as well
    if isinstance(features, list):
        return features
    if features.ndim == 2:
        return projector(features)
    rows = projector(rearrange(features, "b d h w -> (b h w) d"))
    return rearrange(rows, "(b h w) e -> b e h w", b=len(features), h=features.shape[2])


@torch.no_grad()
def build_distillation_projector(
    distillation: Distillation, student: TimmModel, teacher: AnyTeacher, image: Tensor, labels: Tensor | None, seed: int
) -> nn.Module:
    """The projector between two taps, whose shapes come from one forward of each model.

    Args:
        distillation: names taps and projector.
        student: any timm model.
        teacher: with this distillation's tap among its taps.
        image: [1,3,H,W] of the student's size, on the models' device.
        labels: [N] int of the training images, for a contrastive memory.
        seed: of that memory.

    Raises:
        UserError: a model refuses images of this size, the taps cannot be compared, or a memory has nothing to remember.
    """
    distill, config = distillation.distill, distillation.projector
    if distill.student_tap is None or distill.teacher_tap is None or not distill.feature_weight:
        return nn.Identity()
    ours = select_feature(student, probe_student(student, image, [distill.student_tap]), distill.student_tap)
    theirs = teacher.probe(image).tapped[distill.teacher_tap]
    names = f"{distill.student_tap} of the student is {shape_of(ours)}, {distill.teacher_tap} of {distillation.teacher.name} is {shape_of(theirs)}"
    several = [len(each) if isinstance(each, list) else 1 for each in (ours, theirs)]
    if several[0] != several[1]:
        raise UserError(f"{names}: {several[0]} and {several[1]} stages cannot be paired; tap one stage of each by its number")
    if isinstance(ours, list) and isinstance(theirs, list):
        if config.kind == "review_fusion":
            return ReviewFusion([each.shape[1] for each in ours], [each.shape[1] for each in theirs])
        return nn.Identity()
    assert not isinstance(ours, list)
    assert not isinstance(theirs, list)
    widths = ours.shape[1], theirs.shape[1]
    if config.kind == "contrastive":
        return _memory(config, widths, labels, seed)
    assert distill.feature_loss is not None, "checked with the recipe"
    if config.kind == "none" and widths[0] != widths[1] and not FEATURE_OBJECTIVES[distill.feature_loss].any_width:
        raise UserError(f"{names}: with projector.kind=none the widths must be equal; use projector.kind=linear")
    return build_projector(config, *widths)


@torch.no_grad()
def probe_student(student: TimmModel, image: Tensor, taps: Sequence[Tap] = ()) -> Intermediates:
    """The student's output for one image [1,3,H,W], for its shapes; the student is not changed.

    Raises:
        UserError: the student takes images of another size only.
    """
    was_training, stages = student.training, stages_of(student, taps)
    try:
        return forward_with_intermediates(student.eval(), image, stages)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        name = f"student {student.pretrained_cfg.get('architecture') or type(student).__name__}"
        raise UserError(wrong_size(name, student, "data.img_size", image.shape[-1], error)) from None
    finally:
        student.train(was_training)


def _memory(config: Projector, widths: tuple[int, int], labels: Tensor | None, seed: int) -> nn.Module:
    assert isinstance(config.width, int), "checked with the recipe"
    assert config.negatives is not None
    assert config.temperature is not None
    assert config.momentum is not None
    if labels is None:  # a dry run without data
        labels = torch.arange(2, device="cpu")
    return ContrastiveMemory(
        *widths,
        labels,
        width=config.width,
        negatives=config.negatives,
        temperature=config.temperature,
        momentum=config.momentum,
        seed=seed,
    )


def shape_of(tapped: Tapped) -> str:
    """Shapes for people: [B, 192], or [B, 64, 56, 56] + [B, 128, 28, 28] of several maps."""
    levels = tapped if isinstance(tapped, list) else [tapped]
    return " + ".join(str(["B", *level.shape[1:]]).replace("'", "") for level in levels)
