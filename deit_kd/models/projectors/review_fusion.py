"""ReviewKD's trainable side: the student's stages fused from deep to shallow, each into the shape of the teacher's stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ReviewFusion(nn.Module):
    """Attention-based fusion (Chen et al., CVPR 2021).

    Args:
        student_widths: from shallow to deep, the last that of the pooled features as a map of 1 x 1.
        teacher_widths: likewise.
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int]):
        super().__init__()
        middle = min(512, student_widths[-1])
        self.inputs = nn.ModuleList(_convolution(width, middle, 1) for width in student_widths)
        self.outputs = nn.ModuleList(_convolution(middle, width, 3) for width in teacher_widths)
        # Two maps of weights, for a stage and for what comes from below it; the deepest has nothing below.
        self.attention = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) for _ in student_widths[:-1])

    def forward(self, stages: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Stages [B,C,H,W] from shallow to deep -> as many maps, of the teacher's widths and sizes."""
        fused: list[Tensor] = []
        below: Tensor | None = None
        for level in reversed(range(len(stages))):
            own = self.inputs[level](stages[level])
            if below is not None:
                below = F.interpolate(below, own.shape[2:], mode="nearest")
                share = self.attention[level](torch.cat([own, below], dim=1))
                own = own * share[:, :1] + below * share[:, 1:]
            below = own if own.shape[2:] == sizes[level] else F.interpolate(own, sizes[level], mode="nearest")
            fused.insert(0, self.outputs[level](below))
        return fused
