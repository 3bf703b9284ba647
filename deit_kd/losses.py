"""Distillation losses: pure functions of tensors that return a 0-d tensor.

Shapes: B batch, E teacher width, K classes, C/H/W feature map. `student` is already projected to the teacher's width.
Every loss is computed in float32, or in float64 when given float64, whatever the precision of its inputs; gradients flow to the
student alone when the caller detaches the teacher, as `deit_kd.models.teacher.Teacher` does.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalisation = Literal["batch", "l2", "layer", "none"]


def _full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape; project the student first"
        )
    return _full_precision(student, teacher)


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
    student, teacher = _pair(student, teacher)
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
    student, teacher = _pair(student, teacher)
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
    student, teacher = _pair(student, teacher)
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


def norm_direction(student: Tensor, teacher: Tensor, class_means: Tensor) -> Tensor:
    """ND (Wang et al., 2023): mean_b of 1 - <s_b, m_b/|m_b|> / max(|s_b|, |t_b|).

    Args:
        student: [B,D] features, in the teacher's width.
        teacher: [B,D] features of the same images.
        class_means: [B,D] the teacher's class mean of each sample's label, already mixed like the labels under mixup.
    """
    student, teacher = _pair(student, teacher)
    (class_means,) = _full_precision(class_means)
    projected_norm = (student * F.normalize(class_means, dim=1)).sum(dim=1)
    norm = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
    return (1 - projected_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).mean()


def kl_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of softened logits [B,K], summed over classes, mean over the batch (Hinton et al., 2015)."""
    student, teacher = _pair(student_logits, teacher_logits)
    log_student, log_teacher = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def hard_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of logits [B,K] with the teacher's most likely class (Touvron et al., 2021), mean over the batch."""
    student, teacher = _pair(student_logits, teacher_logits)
    return F.cross_entropy(student, teacher.argmax(dim=1))


def _without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[B,K] -> [B,K-1]: the logits of all other classes."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    return logits[others].view(len(logits), -1)


def decoupled_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """DKD (Zhao et al., CVPR 2022): KL of (label, any other class) plus KL among the other classes, both times T^2.

    Args:
        student_logits: [B,K].
        teacher_logits: [B,K].
        labels: [B] int.
        target_weight: weight of the first term (alpha in the paper).
        nontarget_weight: weight of the second term (beta in the paper).
        temperature: T.

    Raises:
        ValueError: fewer than 3 classes, where the second term is empty.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    if student.shape[1] < 3:
        raise ValueError(f"decoupled distillation needs at least 3 classes, got {student.shape[1]}; use kl_distillation")

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B,2] log-probabilities of (label, rest), and [B,K-1] log-probabilities within the rest."""
        others = _without_label(logits, labels)
        label = logits.gather(1, labels[:, None])
        binary = torch.cat([label, others.logsumexp(1, keepdim=True)], 1)
        return F.log_softmax(binary, 1), F.log_softmax(others, 1)

    (binary_s, others_s), (binary_t, others_t) = split(student / temperature), split(teacher / temperature)
    target = F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True)
    nontarget = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * (target_weight * target + nontarget_weight * nontarget)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """DIST (Huang et al., NeurIPS 2022): T^2 (1 - Pearson correlation) of the probabilities [B,K].

    The inter term correlates each sample over the classes, the intra term each class over the batch.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    student, teacher = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    inter, intra = distance(student, teacher), distance(student.t(), teacher.t())
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def normalised_distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """NKD (Yang et al., ICCV 2023): -t_y log s_y + gamma T^2 times the cross-entropy among the other classes.

    student_logits and teacher_logits are [B,K], labels [B] int; the label term uses T = 1; mean over the batch.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    log_label = F.log_softmax(student, 1).gather(1, labels[:, None])
    label = F.softmax(teacher, 1).gather(1, labels[:, None])
    log_others = F.log_softmax(_without_label(student, labels) / temperature, 1)
    others = F.softmax(_without_label(teacher, labels) / temperature, 1)
    return -(label * log_label).mean() - gamma * temperature**2 * (others * log_others).sum(1).mean()


def attention_transfer(student_map: Tensor, teacher_map: Tensor, p: int = 2) -> Tensor:
    """AT (Zagoruyko & Komodakis, ICLR 2017): mean squared distance of the unit-length maps mean_c |x|^p.

    student_map [B,C,H,W] and teacher_map [B,C',H',W']; the larger is average-pooled to the smaller.
    """
    student, teacher = _full_precision(student_map, teacher_map)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))

    def attention(x: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(x, size).abs().pow(p).mean(1).flatten(1), dim=1)

    return (attention(student) - attention(teacher)).square().mean()
