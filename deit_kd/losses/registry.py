"""Losses by their names in recipes: those of this package, and those that users register."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.files import imports
from deit_kd.recipe.objectives import (
    FEATURE_OBJECTIVES,
    LOGIT_OBJECTIVES,
    VECTORS_OR_PLACES,
    FeatureObjective,
    Key,
    LogitObjective,
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
) -> Loss:
    """Makes a function a loss that recipes can name, as `distill.kd_loss` or `distill.feature_loss`.

    Args:
        function: (student, teacher, **keys) -> 0-d tensor. Logits are [B,K], features [B,E]; `labels` [B] come too if it reads them.
            A recipe names it by its own name.
        compares: logits or features.
        keys: its further parameters, which a recipe states in `distill.parameters`, and what each may be.
        couples_samples: the loss of a batch is not the mean of the losses of its samples. Then it sees all rows of the global batch, however
            that is cut over processes and micro-batches.
        reads_labels: of logits alone.
        taps: of features: the taps that it compares.
        projector: of features: the only kind of projector that it works with; None for any.
        any_width: of features: student and teacher may differ in width without a projector.

    Returns:
        The function.

    Raises:
        UserError: no function, a name that is taken, or a key that is no parameter of the function.
    """
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        raise UserError(f"losses.register: needs a function with a name, got {function!r}"[:300])
    if name in LOGIT_OBJECTIVES or name in FEATURE_OBJECTIVES:
        raise UserError(f"losses.register: there is a loss {name} already; rename yours")
    parameters, keys = inspect.signature(function).parameters, dict(keys or {})
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    wanted = [*keys, *(["labels"] if reads_labels else [])]
    if missing := [key for key in wanted if key not in parameters and not takes_any]:
        raise UserError(f"losses.register: {name} has no parameter {', '.join(missing)}; add it, or leave it out of keys")
    if compares == "logits":
        row = LogitObjective(keys=keys, couples_samples=couples_samples, reads_labels=reads_labels, function=function)
        LOGIT_OBJECTIVES[name] = row
    else:
        FEATURE_OBJECTIVES[name] = FeatureObjective(
            keys=keys, couples_samples=couples_samples, taps=taps, projector=projector, any_width=any_width, function=function
        )
    imports.note(Path(inspect.getsourcefile(function) or ""))
    return function


def function_of(name: str) -> Loss:
    """The function of a loss, by its name in recipes."""
    from deit_kd import losses

    row = LOGIT_OBJECTIVES.get(name) or FEATURE_OBJECTIVES.get(name)
    found: Loss = row.function if row and row.function else getattr(losses, name)
    return found
