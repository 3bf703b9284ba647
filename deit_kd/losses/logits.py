"""Logit losses: pure functions of tensors that return a 0-d tensor. Shapes: B batch, K classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_kd.losses.features import full_precision, pair


def kl_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of softened logits [B,K], summed over classes, mean over the batch (Hinton et al., 2015)."""
    student, teacher = pair(student_logits, teacher_logits)
    log_student, log_teacher = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def soft_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """DeiT's soft form (Touvron et al., 2021): T^2 KL(teacher || student) summed, then divided by all B x K elements.

    So it is K times smaller than `kl_distillation`, which divides by B; logits are [B,K].
    """
    return kl_distillation(student_logits, teacher_logits, temperature) / student_logits.shape[1]


def hard_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of logits [B,K] with the teacher's most likely class (Touvron et al., 2021), mean over the batch."""
    student, teacher = pair(student_logits, teacher_logits)
    return F.cross_entropy(student, teacher.argmax(dim=1))


def _without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[B,K] -> [B,K-1]: the logits of all other classes, by their indices: for a mask the host would have to wait for the device."""
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, others + (others >= labels[:, None]))


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
    student, teacher = pair(student_logits, teacher_logits)
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

    Raises:
        ValueError: shapes differ, or B < 2, where the intra term is not defined.
    """
    student, teacher = pair(student_logits, teacher_logits)
    if len(student) < 2:
        raise ValueError("dist correlates over the batch: it needs at least 2 samples, got 1")
    student, teacher = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    inter, intra = distance(student, teacher), distance(student.t(), teacher.t())
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def normalized_distillation(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """NKD (Yang et al., ICCV 2023): -t_y log s_y + gamma T^2 times the cross-entropy among the other classes.

    student_logits and teacher_logits are [B,K], labels [B] int; the label term uses T = 1; mean over the batch.
    """
    student, teacher = pair(student_logits, teacher_logits)
    log_label = F.log_softmax(student, 1).gather(1, labels[:, None])
    label = F.softmax(teacher, 1).gather(1, labels[:, None])
    log_others = F.log_softmax(_without_label(student, labels) / temperature, 1)
    others = F.softmax(_without_label(teacher, labels) / temperature, 1)
    return -(label * log_label).mean() - gamma * temperature**2 * (others * log_others).sum(1).mean()


def dense_hard_distillation(student_logits: Tensor, teacher_logits: Tensor, global_share: float) -> Tensor:
    """CSKD's spatial term (Zhao et al., ICCV 2023): cross-entropy with the teacher's decision at each place.

    Args:
        student_logits: [B,K,h,w], the classifier on each patch.
        teacher_logits: [B,K,H,W], the classifier at each place; the larger of the two maps is average-pooled to the smaller.
        global_share: of the teacher's mean over places in what decides, epoch / epochs in the paper; the rest is the place's own.

    Raises:
        ValueError: numbers of samples or classes differ.
    """
    if student_logits.shape[:2] != teacher_logits.shape[:2]:  # a teacher of fewer classes would pass as labels
        raise ValueError(
            f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} must have the same samples and classes"
        )
    student, teacher = full_precision(student_logits, teacher_logits)
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    decision = torch.lerp(teacher, teacher.mean(dim=(2, 3), keepdim=True), global_share).argmax(dim=1)
    return F.cross_entropy(student, decision)
