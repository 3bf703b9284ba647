"""Distillation losses: pure functions of tensors that return a 0-d tensor, computed in float32 or, given float64, in float64."""

from deit_kd.losses.features import (
    attention_transfer,
    correlation_congruence,
    hierarchical_context,
    layer_norm_smooth_l1,
    logsum,
    logsum_correlation,
    logsum_difference,
    mean_direction,
    mean_squared,
    noise_contrastive,
    norm_direction,
)
from deit_kd.losses.logits import (
    decoupled_distillation,
    dense_hard_distillation,
    dist,
    hard_distillation,
    kl_distillation,
    normalized_distillation,
    soft_distillation,
)
from deit_kd.losses.registry import function_of, register
from deit_kd.recipe.objectives import Key

__all__ = [
    "Key",
    "function_of",
    "register",
    "attention_transfer",
    "correlation_congruence",
    "decoupled_distillation",
    "dense_hard_distillation",
    "dist",
    "hard_distillation",
    "hierarchical_context",
    "kl_distillation",
    "layer_norm_smooth_l1",
    "logsum",
    "logsum_correlation",
    "logsum_difference",
    "mean_direction",
    "mean_squared",
    "noise_contrastive",
    "norm_direction",
    "normalized_distillation",
    "soft_distillation",
]
