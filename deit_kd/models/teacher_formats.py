"""How a teacher's pooled features and logits are written down in fewer bytes, and what they are when they are read back.

features  float32; bf16; int8 (each row divided by a 127th of its largest magnitude, which is stored beside it); pca:R (float16
          coefficients of R principal components, each in units of its standard deviation over the images that they were fitted on)
logits    float32; full (float16); top:K (the K largest log-probabilities as float16 with their classes as int16, and the logarithm of the
          mass that is left, which is spread evenly over all other classes when read: probabilities return, the logits' offset does not)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_kd.errors import UserError

FEATURES, LOGITS = r"float32|bf16|int8|none|pca:[1-9]\d{0,5}", r"float32|full|none|top:[1-9]\d{0,5}"
LOWEST = -1e4  # logarithm of a mass that is left when nothing is


class Basis(NamedTuple):
    """Principal components of a teacher's features; a component's length is the standard deviation along it."""

    mean: Tensor  # [E]
    components: Tensor  # [R,E]


def number_of(name: str) -> int:
    """R of pca:R, K of top:K; 0 of other formats."""
    return int(name.partition(":")[2] or 0)


def check(features: str, logits: str, width: int, num_classes: int) -> None:
    """Refuses formats that are none, or not for a teacher of this width and number of classes.

    Raises:
        UserError: as it says.
    """
    if not re.fullmatch(FEATURES, features) or number_of(features) > width:
        raise UserError(f"--features {features}: must be float32, bf16, int8, none, or pca:R with R from 1 to the width, {width}")
    if not re.fullmatch(LOGITS, logits) or (number_of(logits) and number_of(logits) >= num_classes):
        raise UserError(
            f"--logits {logits}: must be float32, full, none, or top:K with K below the number of classes, {num_classes}"
        )
    if number_of(logits) and num_classes > 2**15:
        raise UserError(f"--logits {logits}: numbers of {num_classes} classes do not fit 16 bits; use full")
    if features == logits == "none":
        raise UserError("--features none --logits none: leaves nothing to cache")


def fit_basis(features: Tensor, rank: int) -> Basis:
    """The first `rank` principal components of features [N,E], in float64.

    Raises:
        UserError: fewer rows than a basis needs.
    """
    if len(features) <= rank:
        raise UserError(f"--features pca:{rank}: needs more than {rank} images to be fitted on, there are {len(features)}")
    mean = features.double().mean(dim=0)
    centerd = features.double() - mean
    variances, vectors = torch.linalg.eigh(centerd.T @ centerd / len(centerd))
    variances, vectors = variances.flip(0)[:rank], vectors.flip(1)[:, :rank]
    deviations = variances.clamp_min(1e-12 * variances[0].clamp_min(1e-300)).sqrt()
    return Basis(mean.float(), (vectors * deviations).T.float())


def layout(formats: tuple[str, str], width: int, num_classes: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape of a row) of each tensor that `encode` gives."""
    features, logits = (name.partition(":")[0] for name in formats)
    rows: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if features == "int8":
        rows |= {"features": (torch.int8, (width,)), "features_scale": (torch.float32, ())}
    elif features == "pca":
        rows["features"] = (torch.float16, (number_of(formats[0]),))
    elif features != "none":
        rows["features"] = ({"float32": torch.float32, "bf16": torch.bfloat16}[features], (width,))
    if logits == "top":
        top = (number_of(formats[1]),)
        rows |= {"logits": (torch.float16, top), "logits_class": (torch.int16, top), "logits_left": (torch.float16, ())}
    elif logits != "none":
        rows["logits"] = ({"float32": torch.float32, "full": torch.float16}[logits], (num_classes,))
    return rows


def encode(features: Tensor, logits: Tensor, formats: tuple[str, str], basis: Basis | None) -> dict[str, Tensor]:
    """Rows as they are stored, from features [B,E] and logits [B,K]; `formats` are those of features and logits."""
    stored: dict[str, Tensor] = {}
    kind = formats[0].partition(":")[0]
    if kind == "int8":
        scale = features.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        stored |= {"features": (features / scale[:, None]).round().to(torch.int8), "features_scale": scale}
    elif kind == "pca":
        assert basis is not None
        inverse = basis.components / basis.components.square().sum(dim=1, keepdim=True)
        stored["features"] = ((features - basis.mean) @ inverse.T).half()
    elif kind != "none":
        stored["features"] = features.to({"float32": torch.float32, "bf16": torch.bfloat16}[kind])
    kind = formats[1].partition(":")[0]
    if kind == "top":
        log_probabilities = F.log_softmax(logits.double(), dim=1)
        order = log_probabilities.argsort(dim=1, descending=True, stable=True)
        top, rest = order[:, : number_of(formats[1])], order[:, number_of(formats[1]) :]
        left = log_probabilities.gather(1, rest).logsumexp(dim=1).clamp_min(LOWEST)
        values = log_probabilities.gather(1, top).clamp_min(LOWEST)
        stored |= {"logits": values.half(), "logits_class": top.to(torch.int16), "logits_left": left.half()}
    elif kind != "none":
        stored["logits"] = logits.to({"float32": torch.float32, "full": torch.float16}[kind])
    return stored


def decode(stored: Mapping[str, Tensor], num_classes: int, basis: Basis | None) -> tuple[Tensor | None, Tensor | None]:
    """(features [B,E], logits [B,K]) in float32, as near to those that were stored as the formats are; None: not stored."""
    features, logits = stored.get("features"), stored.get("logits")
    if features is not None:
        features = features.float()
        if "features_scale" in stored:
            features = features * stored["features_scale"][:, None]
        elif basis is not None:
            features = torch.addmm(basis.mean, features, basis.components)
    if logits is not None:
        logits = logits.float()
        if "logits_class" in stored:
            others = stored["logits_left"].float() - math.log(num_classes - logits.shape[1])
            logits = others[:, None].repeat(1, num_classes).scatter_(1, stored["logits_class"].long(), logits)
    return features, logits


def errors(features: Tensor, logits: Tensor, formats: tuple[str, str], basis: Basis | None) -> dict[str, float]:
    """What is lost of features [B,E] and logits [B,K]: the distance of the features relative to their spread about the mean, and KL in nats."""
    stored_features, stored_logits = decode(encode(features, logits, formats, basis), logits.shape[1], basis)
    lost = {}
    if stored_features is not None:
        spread = (features - features.mean(dim=0)).norm().clamp_min(torch.finfo(torch.float32).tiny)
        lost["features_relative_error"] = float((stored_features - features).norm() / spread)
    if stored_logits is not None:
        ours, theirs = (F.log_softmax(each.double(), dim=1) for each in (stored_logits, logits))
        lost["logits_kl"] = max(0.0, float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True)))
    return lost
