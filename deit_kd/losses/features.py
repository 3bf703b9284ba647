"""Feature losses: pure functions of tensors that return a 0-d tensor.

Shapes: B batch, E teacher width, C/H/W feature map. `student` is already projected to the teacher's width. Gradients flow to the
student alone when the caller detaches the teacher, as `deit_kd.models.teacher.Teacher` does.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_kd.losses.precision import full_precision, pair

Normalisation = Literal["batch", "l2", "layer", "none"]


def _batch_standardise(x: Tensor, norm_eps: float) -> Tensor:
    """Batch normalisation without affine, as a function: biased variance over the batch, x [B,E]."""
    if x.shape[0] < 2:
        raise ValueError("batch statistics need at least 2 samples a batch, got 1")
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    return (x - mean) * torch.rsqrt(variance + norm_eps)


def _log(total: Tensor, eps: float) -> Tensor:
    # Without eps identical features would give log(0) and a NaN gradient; the smallest normal number changes no other value.
    return torch.log((total + eps).clamp_min(torch.finfo(total.dtype).tiny))


def logsum_correlation(student: Tensor, teacher: Tensor, power: float = 4.0, eps: float = 1e-5, norm_eps: float = 1e-5) -> Tensor:
    """LogSum over per-channel cross-correlations: log(sum_e |corr_e - 1|^power + eps).

    corr_e is the correlation over the batch of channel e of the student with channel e of the teacher. The form of the
    authors' DeiT code (Miles & Mikolajczyk, AAAI 2024), which takes norm_eps -> 0. A constant channel has correlation 0: its
    loss is finite and its gradient zero.

    Args:
        student: [B,E] projected features.
        teacher: [B,E] features.
        power: exponent (the paper finds 4 to 5 best).
        eps: added inside the logarithm; it sets the lowest value, log(eps).
        norm_eps: added to the variance in the batch normalisation.

    Raises:
        ValueError: shapes differ, or B < 2.
    """
    student, teacher = pair(student, teacher)
    correlation = (_batch_standardise(student, norm_eps) * _batch_standardise(teacher, norm_eps)).mean(dim=0)
    return _log((correlation - 1).abs().pow(power).sum(), eps)


def logsum(
    student: Tensor,
    teacher: Tensor,
    power: float = 4.0,
    normalisation: Normalisation = "batch",
    eps: float = 1e-5,
    norm_eps: float = 1e-4,
) -> Tensor:
    """The paper's family: log(sum_{b,e} |n(student) - n(teacher)|^power + eps) for a normalisation n of both sides.

    Args:
        student: [B,E] projected features.
        teacher: [B,E] features.
        power: exponent.
        normalisation: "batch" (per channel over the batch), "l2" (unit length), "layer" (per sample over E), "none".
        eps: added inside the logarithm.
        norm_eps: added to the variance in "batch" and "layer".

    Raises:
        ValueError: shapes differ, unknown normalisation, or B < 2 with "batch".
    """
    student, teacher = pair(student, teacher)
    if normalisation == "batch":
        student, teacher = _batch_standardise(student, norm_eps), _batch_standardise(teacher, norm_eps)
    elif normalisation == "layer":
        width = student.shape[1:]
        student, teacher = F.layer_norm(student, width, eps=norm_eps), F.layer_norm(teacher, width, eps=norm_eps)
    elif normalisation == "l2":
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    elif normalisation != "none":
        raise ValueError(f"normalisation must be batch, l2, layer or none, got {normalisation!r}")
    return _log((student - teacher).abs().pow(power).sum(), eps)


def logsum_difference(student: Tensor, teacher: Tensor, power: float = 4.0, eps: float = 0.0, norm_eps: float = 1e-4) -> Tensor:
    """LogSum over element-wise differences, batch-normalised both: the form of the authors' ResNet code; student, teacher [B,E]."""
    return logsum(student, teacher, power, "batch", eps, norm_eps)


def layer_norm_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """VkD (Miles et al., CVPR 2024): smooth L1 of student [B,E] to the layer-normalised teacher [B,E], mean over all elements."""
    student, teacher = pair(student, teacher)
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


def norm_direction(student: Tensor, teacher: Tensor, class_means: Tensor) -> Tensor:
    """ND (Wang et al., 2023): mean_b of 1 - <s_b, m_b/|m_b|> / max(|s_b|, |t_b|).

    Args:
        student: [B,D] features, in the teacher's width.
        teacher: [B,D] features of the same images.
        class_means: [B,D] the teacher's class mean of each sample's label, already mixed like the labels under mixup.
    """
    student, teacher = pair(student, teacher)
    (class_means,) = full_precision(class_means)
    projected_norm = (student * F.normalize(class_means, dim=1)).sum(dim=1)
    norm = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
    return (1 - projected_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).mean()


def attention_transfer(student_map: Tensor, teacher_map: Tensor, p: int = 2) -> Tensor:
    """AT (Zagoruyko & Komodakis, ICLR 2017): mean squared distance of the unit-length maps mean_c |x|^p.

    student_map [B,C,H,W] and teacher_map [B,C',H',W']; the larger is average-pooled to the smaller.
    """
    student, teacher = full_precision(student_map, teacher_map)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))

    def attention(x: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(x, size).abs().pow(p).mean(1).flatten(1), dim=1)

    return (attention(student) - attention(teacher)).square().mean()
