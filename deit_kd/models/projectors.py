"""Projectors: from the student's width D to the teacher's width E. They are trained with the student and left out of its export."""

from __future__ import annotations

from torch import nn

from deit_kd.recipe import Projector


def build_projector(config: Projector, student_width: int, teacher_width: int) -> nn.Module:
    """The projector of the recipe: features [B,D] -> [B,E]."""
    kinds = {"linear": lambda: nn.Linear(student_width, teacher_width, bias=config.bias)}
    return kinds[config.kind]()
