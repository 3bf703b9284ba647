"""How near a student's features come to its teacher's: what is logged beside the loss, in the loss's own terms."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deit_kd.recipe import Distill

PER_CHANNEL = ("logsum_correlation", "logsum_difference")  # normalize channels over the batch, as logsum with normalization=batch


def closeness(distill: Distill, student: Any, teacher: Any) -> dict[str, Tensor]:
    """A number between -1 and 1, under the name of what it is; {} where shapes differ or there are no features.

    Losses that normalize channels over the batch see no length of a vector and no mean of a channel: a cosine can fall while they fall.

    Args:
        distill: names the loss.
        student: projected features [B,E] or [B,C,H,W].
        teacher: its own.

    Returns:
        feature_correlation: of each channel over the samples, mean over channels, for such losses; feature_cosine: of each sample's
        vector, mean over samples, for all others.
    """
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor) and student.shape == teacher.shape):
        return {}
    ours, theirs = (each.detach().float().movedim(1, -1).flatten(0, -2) for each in (student, teacher))
    if distill.feature_loss in PER_CHANNEL or distill.normalization == "batch":
        return {"feature_correlation": F.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0), dim=0).mean()}
    return {"feature_cosine": F.cosine_similarity(ours, theirs, dim=1).mean()}
