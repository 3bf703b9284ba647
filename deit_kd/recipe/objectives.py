"""The objectives. The row of a loss says what it reads, what it compares, and whether it couples samples.

Schema, checks, the distillation terms, the forecast and the model card's citations all read these rows. The functions themselves
are in `deit_kd.losses`; reading a recipe imports no torch, so a row names its function by its key.
"""

from __future__ import annotations

from dataclasses import dataclass

VECTORS = ("pooled", "class_token", "distillation_token", "prefix_tokens")
VECTORS_OR_PLACES = (*VECTORS, "spatial", "a number")  # the places of one map count as so many samples


@dataclass(frozen=True, kw_only=True)
class LogitObjective:
    """A loss between logits.

    Attributes:
        paper: a key of `deit_kd.export.citations.PAPERS`.
        keys: of the section `distill`, passed to the function under the same names.
        couples_samples: the loss of a batch is not the mean of the losses of its samples.
        reads_labels: the function takes `labels` [B].
    """

    paper: str
    keys: tuple[str, ...] = ()
    couples_samples: bool = False
    reads_labels: bool = False


@dataclass(frozen=True, kw_only=True)
class FeatureObjective:
    """A loss between features; see `LogitObjective`.

    Attributes:
        paper: a key of `deit_kd.export.citations.PAPERS`.
        keys: of the section `distill`, passed to the function under the same names.
        couples_samples: the loss of a batch is not the mean of the losses of its samples.
        reads_class_means: the function takes the class mean [B,E] of each sample.
        taps: the taps that it compares.
        projector: the only kind of projector that it works with; None for any that no objective owns.
        any_width: student and teacher may differ in width without a projector.
    """

    paper: str
    keys: tuple[str, ...] = ()
    couples_samples: bool = False
    reads_class_means: bool = False
    taps: tuple[str, ...] = VECTORS_OR_PLACES
    projector: str | None = None
    any_width: bool = False


LOGIT_OBJECTIVES = {
    "kl_distillation": LogitObjective(paper="hinton2015distilling", keys=("temperature",)),
    "soft_distillation": LogitObjective(paper="touvron2021training", keys=("temperature",)),
    "hard_distillation": LogitObjective(paper="touvron2021training"),
    "decoupled_distillation": LogitObjective(
        paper="zhao2022decoupled", keys=("temperature", "target_weight", "nontarget_weight"), reads_labels=True
    ),
    "dist": LogitObjective(paper="huang2022knowledge", keys=("temperature", "inter_weight", "intra_weight"), couples_samples=True),
    "normalized_distillation": LogitObjective(paper="yang2023knowledge", keys=("temperature", "gamma"), reads_labels=True),
}
FEATURE_OBJECTIVES = {
    "logsum": FeatureObjective(paper="miles2024understanding", keys=("power", "normalization"), couples_samples=True),
    "logsum_correlation": FeatureObjective(paper="miles2024understanding", keys=("power",), couples_samples=True),
    "logsum_difference": FeatureObjective(paper="miles2024understanding", keys=("power",), couples_samples=True),
    "layer_norm_smooth_l1": FeatureObjective(paper="miles2024vkd"),
    "norm_direction": FeatureObjective(paper="wang2023improving", taps=VECTORS, reads_class_means=True),
    "mean_direction": FeatureObjective(paper="wang2023improving", taps=VECTORS, reads_class_means=True),
    "mean_squared": FeatureObjective(paper="romero2015fitnets"),
    "attention_transfer": FeatureObjective(
        paper="zagoruyko2017paying", taps=("spatial", "stages", "a number"), projector="none", any_width=True
    ),
    "correlation_congruence": FeatureObjective(
        paper="peng2019correlation", taps=VECTORS, projector="none", any_width=True, couples_samples=True
    ),
    # Its memory couples images over steps; it is completed by itself, whatever `batch_statistics` says.
    "noise_contrastive": FeatureObjective(paper="tian2020contrastive", taps=VECTORS, projector="contrastive"),
    "hierarchical_context": FeatureObjective(paper="chen2021distilling", taps=("stages_and_pooled",), projector="review_fusion"),
    "dense_hard_distillation": FeatureObjective(paper="zhao2023cumulative", taps=("dense_logits",), projector="none"),
}


def couples_samples(loss: str | None) -> bool:
    """Whether a loss, by its name in the recipe, must see the rows of the whole global batch."""
    row = LOGIT_OBJECTIVES.get(loss or "") or FEATURE_OBJECTIVES.get(loss or "")
    return row is not None and row.couples_samples


def keys_of(term: str) -> dict[str, tuple[str, ...]]:
    """For kd or feature, the keys of `distill` that each loss reads: those that choose its tensors, and its parameters."""
    if term == "kd":
        return {name: ("kd_head", *row.keys) for name, row in LOGIT_OBJECTIVES.items()}
    return {
        name: ("student_tap", "teacher_tap", *row.keys, *(("class_means",) if row.reads_class_means else ()))
        for name, row in FEATURE_OBJECTIVES.items()
    }
