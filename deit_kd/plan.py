"""What a recipe amounts to before anything is trained: shapes, parameters, compute, memory, disk. Counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit_kd.classification import build_distiller, build_teacher
from deit_kd.errors import UserError
from deit_kd.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """Counts of a recipe; GMACs are of one image's forward, at the recipe's size."""

    num_classes: int
    student_parameters: int
    student_gmacs: float
    projector_parameters: int
    teacher_parameters: int
    teacher_gmacs: float
    shapes: tuple[tuple[str, str], ...]  # (what, shape)

    @property
    def training_gflop_per_image(self) -> float:
        """Student forward and backward (three forwards' worth), teacher forward; two operations a multiply-accumulate."""
        return 2 * (3 * self.student_gmacs + self.teacher_gmacs)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and AdamW's two moments, float32, of all that is trained (EMA not counted)."""
        return 12 * (self.student_parameters + self.projector_parameters)


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def make_plan(recipe: Recipe, num_classes: int | None) -> Plan:
    """Builds teacher and student without memory for their weights and counts them.

    Args:
        recipe: what would be trained.
        num_classes: of the data; None for as many as the teacher's architecture has by default, when there are no data yet.

    Raises:
        UserError: a name or an argument that timm refuses.
    """
    teacher_recipe = recipe.teacher and replace(recipe.teacher, weights="random", precision="auto")
    image = torch.empty(2, 3, recipe.data.img_size, recipe.data.img_size, device="meta")
    with torch.device("meta"), torch.no_grad():
        classes = num_classes or (recipe.data.num_classes if isinstance(recipe.data.num_classes, int) else 1000)
        teacher = build_teacher(replace(recipe, teacher=teacher_recipe), classes)
        distiller = build_distiller(recipe, classes, teacher).eval()
        teacher_gmacs, shapes = 0.0, [("images", image.shape)]
        if teacher:
            with FlopCounterMode(display=False) as counter:
                output = _forward(teacher, image, f"teacher {recipe.teacher.name if recipe.teacher else ''}")
            teacher_gmacs = counter.get_total_flops() / 2 / len(image) / 1e9
            shapes += [(f"teacher {name}", value.shape) for name, value in output._asdict().items() if value is not None]
        with FlopCounterMode(display=False) as counter:
            student = _forward(distiller, image, f"student {recipe.student.name}")
        total_gmacs = counter.get_total_flops() / 2 / len(image) / 1e9
        shapes += [(f"student {name}", value.shape) for name, value in student._asdict().items() if value is not None]
    projector_parameters = count(distiller.projector) if distiller.projector else 0
    return Plan(
        num_classes=classes,
        student_parameters=count(distiller.student),
        student_gmacs=total_gmacs - projector_parameters / 1e9,
        projector_parameters=projector_parameters,
        teacher_parameters=count(teacher) if teacher else 0,
        teacher_gmacs=teacher_gmacs,
        shapes=tuple((name, str(["B", *shape[1:]]).replace("'", "")) for name, shape in shapes),
    )


def _forward(module: nn.Module, image: torch.Tensor, who: str) -> Any:
    try:
        return module(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{who} cannot take images of 3 x {image.shape[2]} x {image.shape[3]} ({reason}); change data.img_size"
        ) from None


def describe(recipe: Recipe, plan: Plan, train_images: int | None) -> str:
    """The dry run's text: a table of networks, one of shapes, and what the whole run would take."""
    teacher = f"teacher    {recipe.teacher.name} (weights: {recipe.teacher.weights})" if recipe.teacher else "teacher    none"
    lines = [
        f"student    {recipe.student.name}  {plan.student_parameters:,} parameters  {plan.student_gmacs:.3f} GMACs",
        f"{teacher}  {plan.teacher_parameters:,} parameters  {plan.teacher_gmacs:.3f} GMACs",
        f"projector  {plan.projector_parameters:,} parameters",
        "",
        *(f"{name:<22}{shape}" for name, shape in plan.shapes),
        "",
        f"global batch {recipe.global_batch_size}, learning rate {recipe.optim.lr * recipe.lr_factor():.3g} at its peak "
        f"({recipe.optim.lr:g}, rule {recipe.optim.lr_rule})",
        f"a checkpoint takes {plan.checkpoint_bytes / 1e6:.0f} MB, {recipe.run.keep_checkpoints + 1} of them while one is written",
        f"weights, gradients and moments take {plan.checkpoint_bytes * 4 / 3 / 1e6:.0f} MB on each device, the teacher "
        f"{plan.teacher_parameters * 4 / 1e6:.0f} MB in float32; activations come on top",
    ]
    if train_images is None:
        lines.append("pass --data for the number of steps and the compute of the whole run")
    else:
        steps = recipe.epochs * max(1, train_images // recipe.global_batch_size)
        operations = plan.training_gflop_per_image * 1e9 * steps * min(recipe.global_batch_size, train_images)
        hours = operations / 100e12 / 3600
        lines.append(
            f"{steps:,} steps over {recipe.epochs} epochs of {train_images:,} images: {operations / 1e15:,.3g} PFLOP, "
            f"which is {hours:,.3g} hours for each 100 TFLOP/s that the hardware sustains on it"
        )
    return "\n".join(lines)
