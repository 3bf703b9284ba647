"""Label smoothing, mixup and cutmix of a batch, on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deit_kd.recipe import Augmentation


def smooth_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels [B] int -> [B,K]: smoothing/K in every class, plus 1 - smoothing at the label."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_add_(1, labels[:, None], torch.full_like(targets[:, :1], 1 - smoothing))


def partner(count: int, device: torch.device) -> Tensor:
    """The partner [B] int of each sample: its neighbor in the pairs (0,1), (2,3), ...; the last of an odd number is its own."""
    index = torch.arange(count, device=device)
    return torch.where((index ^ 1) < count, index ^ 1, index)


def mix(images: Tensor, targets: Tensor, augmentation: Augmentation, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixes images [B,3,H,W] and targets [B,K] with their partners, by one ratio for the batch.

    Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019), chosen and drawn as timm's batch mode does: ratio from Beta(a, a),
    and for cutmix the ratio corrected to the area of the box that lies inside the image.
    """
    mixup, cutmix = augmentation.mixup, augmentation.cutmix
    if not (mixup or cutmix) or rng.random() >= augmentation.mixup_prob:
        return images, targets
    use_cutmix = bool(cutmix) and (not mixup or rng.random() < augmentation.mixup_switch_prob)
    ratio = float(rng.beta(cutmix, cutmix) if use_cutmix else rng.beta(mixup, mixup))
    other = partner(len(images), images.device)
    if use_cutmix:
        height, width = images.shape[-2:]
        cut = (1 - ratio) ** 0.5
        (top, bottom), (left, right) = (_side(size, int(size * cut), rng) for size in (height, width))
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        images, ratio = mixed, 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = torch.lerp(images[other], images, ratio)
    return images, torch.lerp(targets[other], targets, ratio)


def _side(size: int, cut: int, rng: np.random.Generator) -> tuple[int, int]:
    """An interval of length `cut` about a uniform center, clipped to [0, size]."""
    center = int(rng.integers(size))
    return max(0, center - cut // 2), min(size, center + cut // 2)
