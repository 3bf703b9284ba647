"""The one prepared module: student and projector behind one forward, so that DDP and FSDP see every gradient.

Calling a part past the wrapper (as published codes of this family do) silently leaves its gradients unsynchronised.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from einops import rearrange, reduce
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

TimmModel: TypeAlias = (
    Any  # an nn.Module with timm's forward_features, forward_head, pretrained_cfg ...; nn.Module's type knows none
)


class StudentOutput(NamedTuple):
    """B batch, K classes, D student width, E teacher width."""

    logits: Tensor  # [B,K], class-token head; of a CNN, its only head
    dist_logits: Tensor | None  # [B,K], distillation-token head
    features: Tensor  # [B,D], mean of the patch tokens; of a CNN, its pooled features
    projected: Tensor | None  # [B,E]

    def prediction(self) -> Tensor:
        """[B,K]: what the exported student returns, the mean of its heads."""
        return self.logits if self.dist_logits is None else (self.logits + self.dist_logits) / 2


class Distiller(nn.Module):
    """A timm student and its projector.

    Args:
        student: a timm model; a distilled DeiT gives two logits.
        projector: [B,D] -> [B,E], or None when no feature loss needs it.
    """

    def __init__(self, student: TimmModel, projector: nn.Module | None = None):
        super().__init__()
        self.student: TimmModel = student
        self.projector = projector
        self.has_two_heads = isinstance(student, VisionTransformerDistilled)

    def forward(self, images: Tensor) -> StudentOutput:
        """Images [B,3,H,W], normalised as the student wants them."""
        student = self.student
        tokens = student.forward_features(images)
        if self.has_two_heads:  # timm's forward_head would average the heads outside of its own training mode
            logits = student.head(student.head_drop(tokens[:, 0]))
            dist_logits = student.head_dist(student.head_drop(tokens[:, 1]))
        else:
            logits, dist_logits = student.forward_head(tokens), None
        features = pooled_features(student, tokens)
        projected = None if self.projector is None else self.projector(features)
        return StudentOutput(logits, dist_logits, features, projected)

    def no_weight_decay(self) -> set[str]:
        """Timm's list of the student, under its names here; without it position embedding and class token would decay."""
        listed: set[str] = getattr(self.student, "no_weight_decay", set)()
        return {f"student.{name}" for name in listed}


def pooled_features(model: TimmModel, features: Tensor) -> Tensor:
    """The pooled features of timm's `forward_features`: [B,T,D] tokens -> mean of the patch tokens; else timm's own pooling."""
    if features.ndim == 3 and hasattr(model, "num_prefix_tokens"):
        return reduce(features[:, model.num_prefix_tokens :], "b n d -> b d", "mean")
    return model.forward_head(features, pre_logits=True)


def feature_map(model: TimmModel, features: Tensor) -> Tensor:
    """Timm's `forward_features` as [B,C,H,W], whatever its layout: tokens, NHWC (Swin) or NCHW."""
    if features.ndim == 3:
        patches = features[:, getattr(model, "num_prefix_tokens", 0) :]
        return rearrange(patches, "b (h w) c -> b c h w", h=int(patches.shape[1] ** 0.5))
    return features if features.shape[1] == model.num_features else rearrange(features, "b h w c -> b c h w")


def feature_width(model: TimmModel) -> int:
    """The width of `pooled_features`; where a head has a hidden layer of its own, `num_features` is not it."""
    return getattr(model, "head_hidden_size", model.num_features)
