"""Shapes, parameters, compute, memory and disk of a recipe, counted on the meta device before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit_kd.errors import UserError
from deit_kd.losses.shares import numbers_exchanged
from deit_kd.models.cached_teacher import read_manifest
from deit_kd.models.distiller import Distiller, shape_of
from deit_kd.models.features import Tapped, forward_with_intermediates, select_feature
from deit_kd.models.teacher import AnyTeacher
from deit_kd.recipe import Distill, Distillation, Optim, Teacher
from deit_kd.recipe.objectives import couples_samples


@dataclass(frozen=True)
class Plan:
    """Counts of a recipe; GMACs are of one image's forward, at the recipe's size."""

    num_classes: int
    student_parameters: int
    student_gmacs: float
    projector_parameters: int
    teachers: tuple[tuple[str, int, float], ...]  # (name, parameters, GMACs) of each network, as often as it is run
    cached: bool  # the teacher's answers are read, and it is not run
    shapes: tuple[tuple[str, str], ...]  # (what, shape)
    taps: tuple[str, ...]  # for each distillation: student's tap -> projector -> teacher's tap, and the loss between them
    gathered_per_image: int  # numbers that processes exchange for losses that couple samples
    gathered_per_share: int  # and that they exchange for each micro-batch, however large it is

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all that is trained, float32."""
        return 4 * (self.student_parameters + self.projector_parameters)

    @property
    def teacher_parameters(self) -> int:
        """Parameters of all teachers."""
        return sum(parameters for _, parameters, _ in self.teachers)

    @property
    def teacher_gmacs(self) -> float:
        """GMACs of all teachers, each at its own image size."""
        return sum(gmacs for _, _, gmacs in self.teachers)

    @property
    def training_gflop_per_image(self) -> float:
        """Student forward and backward (three forwards' worth), teacher forward unless it is cached; two operations a multiply-accumulate."""
        return 2 * (3 * self.student_gmacs + (0 if self.cached else self.teacher_gmacs))

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and AdamW's two moments, float32, of all that is trained (EMA not counted)."""
        return 3 * self.gradient_bytes


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_networks(
    distiller: Distiller,
    teachers: Sequence[AnyTeacher],
    distillations: Sequence[Distillation],
    student_name: str,
    num_classes: int,
    img_size: int,
    couples: bool,
) -> Plan:
    """Counts networks on the meta device by running them on two images.

    Args:
        distiller: student and projectors.
        teachers: the teacher of each distillation.
        distillations: of the recipe.
        student_name: its architecture, for messages.
        num_classes: K.
        img_size: pixels a side.
        couples: losses that couple samples see the whole global batch.

    Raises:
        UserError: a network that refuses images of this size.
    """
    image = torch.empty(2, 3, img_size, img_size, device="meta")
    with torch.device("meta"), torch.no_grad():
        distiller.eval()
        shapes: list[tuple[str, Any]] = [("images", image.shape)]
        counted, outputs = [], {}
        for distillation, teacher in zip(distillations, teachers, strict=True):
            if teacher in outputs:
                continue
            with FlopCounterMode(display=False) as counter:
                network = teacher.live
                assert network, "only counted, so no cache was opened"
                outputs[teacher] = output = _forward(network, f"teacher {distillation.teacher.name}", image)
            counted.append((distillation.teacher.name, count(network), counter.get_total_flops() / 2 / len(image) / 1e9))
            number = f" {len(outputs) - 1}" if len(set(teachers)) > 1 else ""
            shapes += [(f"teacher{number} {name}", getattr(output, name).shape) for name in ("logits", "features")]
        tapped = [
            outputs[teacher].tapped[distillation.distill.teacher_tap]
            if distillation.distill.teacher_tap and distillation.distill.feature_weight
            else None
            for distillation, teacher in zip(distillations, teachers, strict=True)
        ]
        with FlopCounterMode(display=False) as counter:
            _forward(distiller, f"student {student_name}", image)
        student_gmacs = counter.get_total_flops() / 2 / len(image) / 1e9
        student = _forward(distiller, f"student {student_name}", image, tapped)
        shapes += [("student logits", student.logits.shape), *(("student dist_logits", each.shape) for each in student.dist_logits)]
        taps = [
            _tap_line(distillation, distiller, image, ours, theirs)
            for distillation, ours, theirs in zip(distillations, student.projected, tapped, strict=True)
            if ours is not None and theirs is not None
        ]
    pairs = zip(distillations, student.projected, tapped, strict=True)
    each = [_gathered(distillation.distill, num_classes, ours, theirs) for distillation, ours, theirs in pairs if couples]
    gathered = [sum(numbers) for numbers in zip((0, 0), *each, strict=True)]
    return Plan(
        num_classes=num_classes,
        gathered_per_image=gathered[0],
        gathered_per_share=gathered[1],
        student_parameters=count(distiller.student),
        student_gmacs=student_gmacs,
        projector_parameters=count(distiller.projectors),
        teachers=tuple(counted),
        cached=any(read_manifest(Path(distillation.teacher.cache)) for distillation in distillations if distillation.teacher.cache),
        shapes=tuple((name, str(["B", *shape[1:]]).replace("'", "")) for name, shape in shapes),
        taps=tuple(taps),
    )


def _gathered(distill: Distill, classes: int, ours: Tapped | None, theirs: Tapped | None) -> tuple[int, int]:
    """Numbers that the processes exchange for each image and for each micro-batch, for losses that couple samples."""
    heads = 2 if distill.kd_head == "both" else 1
    logits = 2 * heads * classes if distill.kd_weight and couples_samples(distill.kd_loss) else 0
    if not (distill.feature_weight and couples_samples(distill.feature_loss)):
        return logits, 0
    assert distill.feature_loss is not None
    sides = [side if isinstance(side, list) else [side] for side in (ours, theirs)]
    if isinstance(theirs, torch.Tensor) and (numbers := numbers_exchanged(distill.feature_loss, vars(distill), theirs.shape[1])):
        return logits, numbers
    return logits + sum(level[0].numel() for levels in sides for level in levels if level is not None), 0


def _tap_line(distillation: Distillation, distiller: Distiller, image: torch.Tensor, projected: Tapped, theirs: Tapped) -> str:
    """The features that one distillation compares, with all shapes."""
    distill, student = distillation.distill, distiller.student
    assert distill.student_tap is not None
    ours = select_feature(student, forward_with_intermediates(student, image, distiller.stages), distill.student_tap)
    way = "" if distillation.projector.kind == "none" else f" -> {distillation.projector.kind} -> {shape_of(projected)}"
    return (
        f"student {distill.student_tap} {shape_of(ours)}{way} | {distill.feature_loss} | "
        f"{distillation.teacher.name} {distill.teacher_tap} {shape_of(theirs)}"
    )


def _teacher_lines(teacher: Teacher) -> Iterator[str]:
    """Image size and cache of a teacher, where they are stated."""
    if teacher.img_size:
        yield f"           {teacher.name} sees images of {teacher.img_size} x {teacher.img_size}"
    if teacher.cache:
        yield f"           {teacher.name} is not run: its answers are read from {teacher.cache}"


def _forward(module: nn.Module, who: str, image: torch.Tensor, *more: Any) -> Any:
    try:
        return module(image, *more)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{who} cannot take images of 3 x {image.shape[2]} x {image.shape[3]} ({reason}); change data.img_size"
        ) from None


def describe(
    plan: Plan,
    train_images: int | None,
    *,
    student_name: str,
    teachers: Iterable[Teacher],
    epochs: int,
    global_batch_size: int,
    optim: Optim,
    lr_factor: float,
    keep_checkpoints: int,
) -> str:
    """The dry run's text: a table of networks, one of shapes, and the compute of the whole run if the number of images is known."""
    lines = [
        f"student    {student_name}  {plan.student_parameters:,} parameters  {plan.student_gmacs:.3f} GMACs",
        *(f"teacher    {name}  {parameters:,} parameters  {gmacs:.3f} GMACs" for name, parameters, gmacs in plan.teachers or ()),
        *([] if plan.teachers else ["teacher    none"]),
        *dict.fromkeys(line for teacher in teachers for line in _teacher_lines(teacher)),
        f"projector  {plan.projector_parameters:,} parameters",
        "",
        *(f"{name:<22}{shape}" for name, shape in plan.shapes),
        *(f"tap                   {tap}" for tap in plan.taps),
        "",
        f"global batch {global_batch_size}, learning rate {optim.lr * lr_factor:.3g} at its peak "
        f"({optim.lr:g}, rule {optim.lr_rule})",
        f"a checkpoint takes {plan.checkpoint_bytes / 1e6:.0f} MB, {keep_checkpoints + 1} of them while one is written",
        f"on several processes a step reduces {plan.gradient_bytes / 1e6:.1f} MB of gradients and gathers "
        f"{plan.gathered_per_image * global_batch_size * 4 / 1e6:.1f} MB of what losses of the whole batch compare"
        + (f", and {plan.gathered_per_share * 4 / 1e3:.3g} kB a process" if plan.gathered_per_share else ""),
        f"weights, gradients and moments take {plan.checkpoint_bytes * 4 / 3 / 1e6:.0f} MB on each device, the teacher "
        f"{plan.teacher_parameters * 4 / 1e6:.0f} MB in float32; activations come on top",
    ]
    if train_images is None:
        lines.append("pass --data for the number of steps and the compute of the whole run")
    else:
        steps = epochs * max(1, train_images // global_batch_size)
        operations = plan.training_gflop_per_image * 1e9 * steps * min(global_batch_size, train_images)
        hours = operations / 100e12 / 3600
        lines.append(
            f"{steps:,} steps over {epochs} epochs of {train_images:,} images: {operations / 1e15:,.3g} PFLOP, "
            f"which is {hours:,.3g} hours for each 100 TFLOP/s that the hardware sustains on it; deit-kd plan says hours on known devices"
        )
    return "\n".join(lines)
