"""Distillation losses: pure functions of tensors that return a 0-d tensor, computed in float32 or, given float64, in float64."""

from deit_kd.losses.features import (
    attention_transfer,
    layer_norm_smooth_l1,
    logsum,
    logsum_correlation,
    logsum_difference,
    norm_direction,
)
from deit_kd.losses.logits import (
    decoupled_distillation,
    dist,
    hard_distillation,
    kl_distillation,
    normalised_distillation,
)

__all__ = [
    "attention_transfer",
    "decoupled_distillation",
    "dist",
    "hard_distillation",
    "kl_distillation",
    "layer_norm_smooth_l1",
    "logsum",
    "logsum_correlation",
    "logsum_difference",
    "norm_direction",
    "normalised_distillation",
]
