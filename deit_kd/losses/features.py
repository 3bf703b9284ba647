"""Feature losses: pure functions of tensors that return a 0-d tensor.

Shapes: B batch, E teacher width, C/H/W feature map. `student` is already projected to the teacher's width. Gradients flow to the
student alone when the caller detaches the teacher, as `deit_kd.models.teacher.Teacher` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalization = Literal["batch", "l2", "layer", "none"]


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


def _batch_standardize(x: Tensor, norm_eps: float) -> Tensor:
    """Batch normalization without affine, as a function: biased variance over the batch, x [B,E]."""
    if x.shape[0] < 2:
        raise ValueError("batch statistics need at least 2 samples a batch, got 1")
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    return (x - mean) * torch.rsqrt(variance + norm_eps)


def _log_sum_of_powers(x: Tensor, power: float, eps: float) -> Tensor:
    """log(sum |x|^power + eps), of the numbers relative to the largest where their powers would overflow.

    Without eps a sum of zeros would give log(0) and a NaN gradient: the smallest normal number stands for it.
    """
    x = x.abs()
    limit = torch.finfo(x.dtype).max ** (0.5 / power)
    scale = (x.detach().amax() / limit).clamp_min(1.0)
    total = (x / scale).pow(power).sum() + eps * scale.pow(-power)
    return torch.log(total.clamp_min(torch.finfo(x.dtype).tiny)) + power * torch.log(scale)


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
        norm_eps: added to the variance in the batch normalization.

    Raises:
        ValueError: shapes differ, or B < 2.
    """
    student, teacher = pair(student, teacher)
    correlation = (_batch_standardize(student, norm_eps) * _batch_standardize(teacher, norm_eps)).mean(dim=0)
    return _log_sum_of_powers(correlation - 1, power, eps)


def logsum(
    student: Tensor,
    teacher: Tensor,
    power: float = 4.0,
    normalization: Normalization = "batch",
    eps: float = 1e-5,
    norm_eps: float = 1e-4,
) -> Tensor:
    """The paper's family: log(sum_{b,e} |n(student) - n(teacher)|^power + eps) for a normalization n of both sides.

    Args:
        student: [B,E] projected features.
        teacher: [B,E] features.
        power: exponent.
        normalization: "batch" (per channel over the batch), "l2" (unit length), "layer" (per sample over E), "none".
        eps: added inside the logarithm.
        norm_eps: added to the variance in "batch" and "layer".

    Raises:
        ValueError: shapes differ, unknown normalization, or B < 2 with "batch".
    """
    student, teacher = pair(student, teacher)
    if normalization == "batch":
        student, teacher = _batch_standardize(student, norm_eps), _batch_standardize(teacher, norm_eps)
    elif normalization == "layer":
        width = student.shape[1:]
        student, teacher = F.layer_norm(student, width, eps=norm_eps), F.layer_norm(teacher, width, eps=norm_eps)
    elif normalization == "l2":
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    elif normalization != "none":
        raise ValueError(f"normalization must be batch, l2, layer or none, got {normalization!r}")
    return _log_sum_of_powers(student - teacher, power, eps)


def logsum_difference(student: Tensor, teacher: Tensor, power: float = 4.0, eps: float = 0.0, norm_eps: float = 1e-4) -> Tensor:
    """LogSum over element-wise differences, batch-normalized both: the form of the authors' ResNet code; student, teacher [B,E]."""
    return logsum(student, teacher, power, "batch", eps, norm_eps)


def layer_norm_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """VkD (Miles et al., CVPR 2024): smooth L1 of student [B,E] to the layer-normalized teacher [B,E], mean over all elements."""
    student, teacher = pair(student, teacher)
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


def norm_direction(student: Tensor, teacher: Tensor, class_means: Tensor) -> Tensor:
    """ND (Wang et al., 2023): mean_b of 1 - <s_b, m_b/|m_b|> / max(|s_b|, |t_b|).

    Args:
        student: [B,D] features, in the teacher's width.
        teacher: [B,D] features of the same images.
        class_means: [B,D] the teacher's class mean of each sample's label, already mixed like the labels under mixup.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = pair(student, teacher)
    student, class_means = pair(student, class_means)
    tiny = torch.finfo(student.dtype).tiny
    # A matrix product for each sample: no [B,D] product is written out, which at D = 3024 is most of the time.
    projected_norm = torch.linalg.vecdot(student, class_means) / class_means.norm(dim=1).clamp_min(tiny)
    norm = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
    return (1 - projected_norm / norm.clamp_min(tiny)).mean()


def attention_transfer(student_map: Tensor, teacher_map: Tensor, p: int = 2) -> Tensor:
    """AT (Zagoruyko & Komodakis, ICLR 2017): mean squared distance of the unit-length maps mean_c |x|^p.

    student_map [B,C,H,W] and teacher_map [B,C',H',W']; the larger is average-pooled to the smaller.

    Raises:
        ValueError: the numbers of samples differ.
    """
    if len(student_map) != len(teacher_map):
        raise ValueError(f"student has {len(student_map)} samples and teacher {len(teacher_map)}; they must be the same images")
    student, teacher = full_precision(student_map, teacher_map)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))

    def attention(x: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(x, size).abs().pow(p).mean(1).flatten(1), dim=1)

    return (attention(student) - attention(teacher)).square().mean()


def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNet's hint (Romero et al., ICLR 2015): mean over all elements of the squared difference, any one shape."""
    student, teacher = pair(student, teacher)
    return F.mse_loss(student, teacher)


def mean_direction(student: Tensor, class_means: Tensor) -> Tensor:
    """Direction alone, which the ND paper looks at first: mean_b of 1 - cos(s_b, m_b).

    student is [B,D], class_means [B,D] as in `norm_direction`.
    """
    student, class_means = pair(student, class_means)
    return (1 - F.cosine_similarity(student, class_means, dim=1)).mean()


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """CC (Peng et al., ICCV 2019): mean squared difference of the two B x B matrices of correlations between samples.

    A correlation is the Gaussian kernel exp(-gamma |f_i - f_j|^2) of features of length 1, by its Taylor series in <f_i, f_j> up to
    `order`. RepDistiller's `Correlation`, behind CC's numbers in CRD's tables, is another formula: products of neighboring differences.

    Args:
        student: [B,D] features; widths may differ.
        teacher: [B,E] features.
        gamma: of the kernel.
        order: highest power of the series.

    Raises:
        ValueError: the numbers of samples differ.
    """
    if len(student) != len(teacher):  # matrices of 1 x 1 would broadcast
        raise ValueError(f"student has {len(student)} samples and teacher {len(teacher)}; they must be the same images")
    student, teacher = full_precision(student, teacher)

    def kernel(features: Tensor) -> Tensor:
        features = F.normalize(features, dim=1)
        gram = features @ features.t()
        terms = [(2 * gamma) ** p / math.factorial(p) * gram**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)

    return (kernel(student) - kernel(teacher)).square().mean()


def hierarchical_context(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """ReviewKD's loss (Chen et al., CVPR 2021) between fused student maps and teacher maps [B,C,H,W], summed over the levels.

    A level is the mean squared difference at full size and of averages over 4 x 4, 2 x 2 and 1 x 1 parts (those that are smaller
    than the map), with weights 1, 1/2, 1/4, 1/8 that are divided by their sum.

    Raises:
        ValueError: the shapes of a level differ.
    """

    def level(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = pair(student, teacher)
        total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
        for size in (4, 2, 1):
            if size < student.shape[2]:
                weight /= 2
                weights += weight
                total = total + weight * F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
        return total / weights

    return torch.stack([level(student, teacher) for student, teacher in zip(students, teachers, strict=True)]).sum()


def noise_contrastive(scores: Tensor, population: int, eps: float = 1e-7) -> Tensor:
    """CRD's objective (Tian et al., ICLR 2020), its released form: is a score that of the image itself, or of noise?

    Args:
        scores: [B,1+N], normalized probabilities of a candidate, the image itself first, then N negatives.
        population: the number of images that negatives are drawn from.
        eps: added in the denominators.

    Returns:
        -log p/(p + N/population) of the positive, -log (N/population)/(p + N/population) summed over negatives; mean over the batch.
    """
    (scores,) = full_precision(scores)
    noise = (scores.shape[1] - 1) / population
    positive, negatives = scores[:, 0], scores[:, 1:]
    # log(p) - log(p + ...) would be -inf for a score that underflows; eps keeps both finite.
    log_positive = torch.log(positive.clamp_min(torch.finfo(scores.dtype).tiny)) - torch.log(positive + noise + eps)
    log_negatives = math.log(noise) - torch.log(negatives + noise + eps)
    return -(log_positive + log_negatives.sum(dim=1)).mean()
