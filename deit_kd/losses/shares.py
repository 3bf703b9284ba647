"""Losses that couple samples, from a few numbers of each share of a batch: processes then exchange these in place of their rows.

Shares have equally many rows. The values are those of the function of all rows, to rounding: variances and covariances are of centered rows,
and combine by adding what is not negative, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_kd.losses.features import _log_sum_of_powers, logsum, pair


class ByShares(NamedTuple):
    """A loss in two steps, between which processes exchange numbers.

    Attributes:
        of_rows: (student [b,E], teacher [b,E], parameters of the loss) -> numbers of a share of the rows, of one shape for all.
        of_shares: (numbers of P shares [P,...], parameters of the loss) -> the loss of all rows.
    """

    of_rows: Callable[..., Tensor]
    of_shares: Callable[..., Tensor]


def by_shares(loss: str, parameters: Mapping[str, Any]) -> ByShares | None:
    """The two steps of a loss; None for one that needs all rows together."""
    if loss == "logsum_correlation":
        return ByShares(_moments, _logsum_correlation)
    if loss == "logsum" and parameters["normalization"] != "batch":  # each row is normalized by itself
        return ByShares(_log_of_a_sum, _logsum)
    return None


def numbers_exchanged(loss: str, parameters: Mapping[str, Any], width: int) -> int | None:
    """How many numbers a share has; None for a loss that needs all rows."""
    if by_shares(loss, parameters) is None:
        return None
    return 5 * width if loss == "logsum_correlation" else 1


def _moments(student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
    """[5,E]: means of student and teacher, their variances, and their covariance."""
    student, teacher = pair(student, teacher)
    s, t = student.mean(0), teacher.mean(0)
    a, b = student - s, teacher - t
    return torch.stack([s, t, a.square().mean(0), b.square().mean(0), (a * b).mean(0)])


def _logsum_correlation(shares: Tensor, power: float = 4.0, eps: float = 1e-5, norm_eps: float = 1e-5) -> Tensor:
    s, t, s_variance, t_variance, covariance = shares.unbind(1)
    a, b = s - s.mean(0), t - t.mean(0)
    of_student, of_teacher = (s_variance + a.square()).mean(0), (t_variance + b.square()).mean(0)
    scale = torch.rsqrt(of_student + norm_eps) * torch.rsqrt(of_teacher + norm_eps)
    return _log_sum_of_powers((covariance + a * b).mean(0) * scale - 1, power, eps)


def _log_of_a_sum(student: Tensor, teacher: Tensor, **parameters: Any) -> Tensor:
    """[]: the loss of these rows, without eps."""
    return logsum(student, teacher, **{**parameters, "eps": 0.0})


def _logsum(shares: Tensor, eps: float = 1e-5, **_: Any) -> Tensor:
    return torch.cat([shares, torch.full_like(shares[:1], eps).log()]).logsumexp(0)
