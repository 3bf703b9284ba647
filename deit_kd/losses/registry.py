"""Losses by their names in recipes: those of this package, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.files import imports
from deit_kd.recipe.objectives import (
    FEATURE_OBJECTIVES,
    LOGIT_OBJECTIVES,
    PROJECTORS,
    TAPS,
    VECTORS_OR_PLACES,
    FeatureObjective,
    Key,
    LogitObjective,
    check_registration,
)

Loss = Callable[..., Tensor]


def register(
    function: Loss,
    *,
    compares: Literal["logits", "features"],
    keys: Mapping[str, Key] | None = None,
    couples_samples: bool = False,
    reads_labels: bool = False,
    taps: tuple[str, ...] = VECTORS_OR_PLACES,
    projector: str | None = None,
    any_width: bool = False,
    paper: str = "",
) -> Loss:
    """Makes a function a loss that recipes can name, as `distill.kd_loss` or `distill.feature_loss`.

    Args:
        function: (student, teacher, **keys) -> 0-d tensor. Logits are [B,K], features [B,E]; `labels` [B] come too if it reads them.
            A recipe names it by its own name.
        compares: logits or features.
        keys: its further parameters, which a recipe states in `distill.parameters`, and what each may be.
        couples_samples: the loss of a batch is not the mean of the losses of its samples. Then it sees all rows of the global batch, however
            that is cut over processes and micro-batches.
        reads_labels: only for compares='logits'.
        taps: of features: the taps that it compares.
        projector: of features: the only kind of projector that it works with; None for any.
        any_width: of features: student and teacher may differ in width without a projector.
        paper: a BibTeX entry, which the model card cites.

    Returns:
        The function.

    Raises:
        UserError: no function, a name that is taken, keys that are not its further parameters, or an argument of the other sort of loss.
    """
    what, keys = "losses.register", dict(keys or {})
    given = [*keys, *(["labels"] if reads_labels else [])]
    name = check_registration(what, function, {**LOGIT_OBJECTIVES, **FEATURE_OBJECTIVES}, given)
    if paper and not paper.lstrip().startswith("@"):
        raise UserError(f"{what}: paper of {name} must be a BibTeX entry, @article{{...}}; got {paper[:40]!r}")
    if compares == "logits":
        if (taps, projector, any_width) != (VECTORS_OR_PLACES, None, False):
            raise UserError(f"{what}: taps, projector and any_width are for compares='features'; leave them out for {name}")
        FEATURE_OBJECTIVES.pop(name, None)
        LOGIT_OBJECTIVES[name] = LogitObjective(
            paper=paper, keys=keys, couples_samples=couples_samples, reads_labels=reads_labels, function=function
        )
    elif compares == "features":
        if unknown := [tap for tap in taps if tap not in TAPS]:
            raise UserError(f"{what}: {name} compares the tap {unknown[0]!r}, which does not exist; choose of {', '.join(TAPS)}")
        if reads_labels:
            raise UserError(f"{what}: reads_labels is for compares='logits'; leave it out for {name}")
        if projector is not None and projector not in PROJECTORS:
            raise UserError(f"{what}: {name} needs the projector {projector!r}, which does not exist; register it first")
        LOGIT_OBJECTIVES.pop(name, None)
        FEATURE_OBJECTIVES[name] = FeatureObjective(
            paper=paper, keys=keys, couples_samples=couples_samples, taps=taps, projector=projector, any_width=any_width,
            function=function,
        )  # fmt: skip
    else:
        raise UserError(f"{what}: compares must be 'logits' or 'features', got {compares!r}")
    imports.note_source(function)
    return function


def function_of(name: str) -> Loss:
    """The function of a loss, by its name in recipes."""
    from deit_kd import losses

    row = LOGIT_OBJECTIVES.get(name) or FEATURE_OBJECTIVES.get(name)
    if row and row.function:
        return partial(_checked, row.function)
    found: Loss = getattr(losses, name)
    return found


def _checked(function: Loss, student: Tensor, teacher: Tensor, **parameters: Any) -> Tensor:
    """What a registered loss returns.

    Raises:
        UserError: it is no 0-d tensor, or has no gradient.
    """
    value, name = function(student, teacher, **parameters), function.__name__
    if not isinstance(value, Tensor) or value.ndim:
        found = f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"loss {name}: must return a 0-d tensor, got {found}; return its mean, for example")
    if student.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
        raise UserError(f"loss {name}: what it returns has no gradient to the student; leave out detach, item and argmax")
    return value
