"""Overrides of the quick start for each objective, and which of them are tried over layouts."""

from __future__ import annotations

import re

from deit_kd.recipe.objectives import couples_samples

NO_KD = "kd_loss: null, kd_weight: 0"
NO_FEATURE = "feature_loss: null, feature_weight: 0"
NONE, LINEAR = "projector={kind: none}", "projector={kind: linear, bias: true, depth: 1, width: teacher}"


def kd(loss: str, more: str = "", head: str = "distillation") -> list[str]:
    return [NONE, f"distill={{kd_loss: {loss}, kd_weight: 1, kd_head: {head}, {more} {NO_FEATURE}}}"]


def feature(loss: str, projector: str = LINEAR, student: str = "pooled", teacher: str = "pooled", more: str = "") -> list[str]:
    taps = f"student_tap: {student}, teacher_tap: {teacher}"
    return [projector, f"distill={{{NO_KD}, feature_loss: {loss}, feature_weight: 1, {taps}, {more}}}"]


CNN = "student={name: resnet10t, drop_path: 0, model_args: {}}"
OBJECTIVES = {
    "kl": kd("kl_distillation", "temperature: 4,"),
    "kl on both heads": kd("kl_distillation", "temperature: 1,", "both"),
    "soft": kd("soft_distillation", "temperature: 3,"),
    "hard": kd("hard_distillation", "", "class"),
    "dkd": kd("decoupled_distillation", "temperature: 4, target_weight: 1, nontarget_weight: 8,"),
    "dist": kd("dist", "temperature: 1, inter_weight: 1, intra_weight: 1,"),
    "nkd": kd("normalized_distillation", "temperature: 1, gamma: 1.5,"),
    "logsum_correlation": feature("logsum_correlation", more="power: 4"),
    "logsum_difference": feature("logsum_difference", more="power: 4"),
    **{f"logsum {n}": feature("logsum", more=f"power: 2, normalization: {n}") for n in ("none", "l2", "batch", "layer")},
    "vkd": feature("layer_norm_smooth_l1", "projector={kind: orthonormal}"),
    "nd": feature("norm_direction", "projector={kind: bn_dropout_linear, dropout: 0.5}", "prefix_tokens", more="class_means: auto"),
    "direction": feature("mean_direction", more="class_means: auto"),
    "fitnet": feature("mean_squared", student="2", teacher="-1"),
    "spatial logsum through an MLP": feature(
        "logsum_correlation", "projector={kind: linear, bias: true, depth: 2, width: 128}", "spatial", "spatial", "power: 4"
    ),
    "at": feature("attention_transfer", NONE, "spatial", "spatial"),
    "at of a CNN's stages": [*feature("attention_transfer", NONE, "stages", "stages"), CNN],
    "cc": feature("correlation_congruence", NONE),
    "crd": feature(
        "noise_contrastive", "projector={kind: contrastive, width: 32, negatives: 256, momentum: 0.5, temperature: 0.07}"
    ),
    "reviewkd": [
        *feature("hierarchical_context", "projector={kind: review_fusion}", "stages_and_pooled", "stages_and_pooled"),
        CNN,
    ],
    "cskd": feature("dense_hard_distillation", NONE, "dense_logits", "dense_logits"),
}
LOSS_OF = {name: (set(re.findall(r"_loss: (\w+)", overrides[1])) - {"null"}).pop() for name, overrides in OBJECTIVES.items()}
# An objective for each loss that couples samples, by the rows; and a normalization, a memory and two losses that do not.
FIRST = {LOSS_OF[name]: name for name in reversed(OBJECTIVES) if couples_samples(LOSS_OF[name])}
COUPLED = [*sorted(FIRST.values()), "logsum l2", "crd", "nd", "kl"]
