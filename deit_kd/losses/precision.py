"""In which precision a loss is computed: float32, or float64 when it is given float64, whatever its inputs come in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float64 stays, all else becomes float32."""
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Both in full precision.

    Raises:
        ValueError: their shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape; project the student first"
        )
    return full_precision(student, teacher)
