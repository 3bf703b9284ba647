"""Taps: features of a timm model by name, all from one forward. `deit_kd.recipe.schema.Tap` lists the names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import timm
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from deit_kd.errors import UserError

TimmModel: TypeAlias = (
    Any  # an nn.Module with timm's forward_features, forward_head, pretrained_cfg ...; nn.Module's type knows none
)
Tap: TypeAlias = str | int
Tapped: TypeAlias = Tensor | list[Tensor]


class Intermediates(NamedTuple):
    """What one forward leaves: timm's `forward_features`, and the maps [B,C,H,W] of the stages that were asked for."""

    final: Tensor
    stages: dict[int, Tensor]


def stages_of(model: TimmModel, taps: Iterable[Tap]) -> list[int]:
    """The stages (of a ViT: blocks) that these taps need.

    Raises:
        UserError: a number that the model has no stage of.
    """
    count = len(model.feature_info)
    wanted: set[int] = set()
    for tap in taps:
        if isinstance(tap, int):
            if not -count <= tap < count:
                raise UserError(f"a tap at stage {tap}: {type(model).__name__} has stages 0 to {count - 1}")
            wanted.add(tap % count)
        elif tap.startswith("stages"):
            wanted |= set(_four(model))
    return sorted(wanted)


def _four(model: TimmModel) -> list[int]:
    """The last four stages; of a model whose stages all have one size, as a ViT's blocks, four at equal distances."""
    count = len(model.feature_info)
    if count >= 8 and len({stage["reduction"] for stage in model.feature_info}) == 1:
        return [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    return list(range(max(0, count - 4), count))


def wrong_size(who: str, model: TimmModel, key: str, size: int, error: Exception) -> str:
    """What is wrong where a network cannot compute images of a size, with the size that it was made for."""
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    own = fixed[-1] if fixed else timm.data.resolve_model_data_config(model)["input_size"][-1]
    remedy = f"set {key}={own}" if own != size else f"set another {key}, or take another network"
    return f"{who}: cannot take images of {size} pixels a side ({' '.join(str(error).split())[:200]}); {remedy}"


def forward_with_intermediates(model: TimmModel, images: Tensor, stages: list[int]) -> Intermediates:
    """One forward up to the last map or tokens, images [B,3,H,W]."""
    if not stages:
        return Intermediates(model.forward_features(images), {})
    final, maps = model.forward_intermediates(images, indices=stages)
    return Intermediates(final, dict(zip(stages, maps, strict=True)))


def select_feature(model: TimmModel, hidden: Intermediates, tap: Tap) -> Tapped:
    """The features of one tap: [B,D], [B,C,H,W], or several maps.

    Raises:
        UserError: the model has no such features.
    """
    final = hidden.final
    if isinstance(tap, int):
        return hidden.stages[tap % len(model.feature_info)]
    if tap == "pooled":
        return pooled_features(model, final)
    if tap == "spatial":
        return feature_map(model, final)
    if tap == "dense_logits":
        return dense_logits(model, final)
    if tap == "stages":
        return [hidden.stages[stage] for stage in _four(model)]
    if tap == "stages_and_pooled":
        return [*(hidden.stages[stage] for stage in _four(model)), pooled_features(model, final)[:, :, None, None]]
    tokens = _prefix_tokens(model, final)
    needed = {"class_token": 1, "distillation_token": 2, "prefix_tokens": 1}[tap]
    if tokens < needed:
        raise UserError(f"tap {tap}: {type(model).__name__} has no such token; use pooled")
    if tap == "prefix_tokens":
        return final[:, :tokens].mean(dim=1)
    return final[:, needed - 1]


def pooled_features(model: TimmModel, features: Tensor) -> Tensor:
    """The pooled features of timm's `forward_features`: [B,T,D] tokens -> mean of the patch tokens; else timm's own pooling."""
    if features.ndim == 3 and hasattr(model, "num_prefix_tokens"):
        return reduce(features[:, model.num_prefix_tokens :], "b n d -> b d", "mean")
    return model.forward_head(features, pre_logits=True)


def feature_map(model: TimmModel, features: Tensor) -> Tensor:
    """Timm's `forward_features` as [B,C,H,W], whatever its layout: tokens, NHWC (Swin) or NCHW."""
    if features.ndim == 3:
        patches = features[:, _prefix_tokens(model, features) :]
        side = math.isqrt(patches.shape[1])
        if not side or side * side != patches.shape[1]:
            raise UserError(
                f"tap spatial: {type(model).__name__} ends in tokens that form no square map; tap a stage by its number"
            )
        return rearrange(patches, "b (h w) c -> b c h w", h=side)
    return features if features.shape[1] == model.num_features else rearrange(features, "b h w c -> b c h w")


def _prefix_tokens(model: TimmModel, final: Tensor) -> int:
    """How many of the tokens [B,T,D] are class and distillation tokens; PiT ends in these alone."""
    alone = final.shape[1] if getattr(model, "global_pool", None) == "token" else 0
    return int(getattr(model, "num_prefix_tokens", alone))


def classifiers(model: TimmModel) -> tuple[nn.Module, ...]:
    """The class head, and behind it the distillation heads."""
    heads = model.get_classifier()
    return tuple(heads) if isinstance(heads, (tuple, list)) else (heads,)


def head_logits(model: TimmModel, final: Tensor) -> list[Tensor]:
    """Logits [B,K] of each of the `classifiers`; timm's forward_head would average them outside of its own training mode."""
    heads = classifiers(model)
    if len(heads) == 1:
        return [model.forward_head(final)]
    if model.global_pool == "token":  # DeiT, PiT: a token for each head
        return [head(model.head_drop(final[:, token])) for token, head in enumerate(heads)]
    pooled = model.forward_head(final, pre_logits=True)  # LeViT, EfficientFormer
    return [head(pooled) for head in heads]


def dense_logits(model: TimmModel, features: Tensor) -> Tensor:
    """[B,K,H,W]: the classifier at each place instead of after pooling; of a DeiT the distillation head on each patch.

    Raises:
        UserError: what stands between the map and the classifier is more than pooling.
    """
    head = classifiers(model)[-1]
    spatial = feature_map(model, features)
    if not isinstance(head, nn.Linear) or head.in_features != spatial.shape[1]:
        raise UserError(f"tap dense_logits: the classifier of {type(model).__name__} cannot be applied to each place of its map")
    return F.conv2d(spatial, head.weight[:, :, None, None], head.bias)
