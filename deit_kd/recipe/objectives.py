"""The objectives. The row of a loss says what it reads, what it compares, and whether it couples samples.

Schema, checks, the distillation terms, the forecast and the model card's citations all read these rows. The functions themselves are in
`deit_kd.losses`, which also registers losses of users here. Reading a recipe imports no torch, so a row names its function by its key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from deit_kd.errors import UserError

VECTORS = ("pooled", "class_token", "distillation_token", "prefix_tokens")
VECTORS_OR_PLACES = (*VECTORS, "spatial", "a number")  # each position of a feature map counts as one sample
TAPS = (*VECTORS_OR_PLACES, "stages", "stages_and_pooled", "dense_logits")


@dataclass(frozen=True)
class Key:
    """What a key may be: a number in a range, true or false, or one of some words.

    Attributes:
        type: float, int or bool; a float may be written as an integer.
        at_least: the smallest number.
        above: an exclusive lower bound.
        at_most: the largest number.
        words: all that it may be; for keys that are no number.
    """

    type: type[float] | type[int] | type[bool] = float
    _: KW_ONLY
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people: `≥ 1`, `in [0, 1]`, `batch or l2`."""
        if self.words or self.type is bool:
            return " or ".join(self.words or ("true", "false"))
        if (self.at_least, self.at_most) == (0, 1):
            return "in [0, 1]"
        bounds = (("≥", self.at_least), (">", self.above), ("≤", self.at_most))
        return ", ".join(f"{sign} {bound:,g}" for sign, bound in bounds if bound is not None) or "any"

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as `must be ..., got ...`; None if nothing is."""
        if self.words:
            return None if value in self.words else f"must be {' or '.join(self.words)}, got {value}"
        if self.type is bool:
            return None if isinstance(value, bool) else f"must be true or false, got {value}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"must be a number, got {value}"
        if self.type is int and not isinstance(value, int):
            return f"must be an integer, got {value}"
        if (self.at_least, self.at_most) == (0, 1) and not 0 <= value <= 1:
            return f"must lie in [0, 1], got {value}"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}, got {value}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}, got {value}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most:,}, got {value}"
        return None


@dataclass(frozen=True, kw_only=True)
class LogitObjective:
    """A loss between logits.

    Attributes:
        paper: a key of `deit_kd.export.citations.PAPERS`; of a registered loss a BibTeX entry, or an empty string.
        keys: of the section `distill`, passed to the function under the same names; of a user's loss those of `distill.parameters`.
        couples_samples: the loss of a batch is not the mean of the losses of its samples.
        reads_labels: the function takes `labels` [B].
        function: of a user; None for the function of `deit_kd.losses` with the row's name.
    """

    paper: str = ""
    keys: Mapping[str, Key] = field(default_factory=dict)
    couples_samples: bool = False
    reads_labels: bool = False
    function: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureObjective:
    """A loss between features; see `LogitObjective`.

    Attributes:
        paper: see `LogitObjective`, as `keys`, `couples_samples` and `function`.
        reads_class_means: the function takes the class mean [B,E] of each sample.
        taps: the taps that it compares.
        projector: the only kind of projector that it works with; None: any but those that belong to one objective.
        any_width: student and teacher may differ in width without a projector.
    """

    paper: str = ""
    keys: Mapping[str, Key] = field(default_factory=dict)
    couples_samples: bool = False
    reads_class_means: bool = False
    taps: tuple[str, ...] = VECTORS_OR_PLACES
    projector: str | None = None
    any_width: bool = False
    function: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ProjectorKind:
    """A kind of projector.

    Attributes:
        keys: of the section `projector`; of a user's projector those of `projector.parameters`.
        function: of a user: (student width, teacher width, **keys) -> module.
    """

    keys: Mapping[str, Key] = field(default_factory=dict)
    function: Callable[..., Any] | None = None


WEIGHT, POSITIVE, SHARE = Key(at_least=0), Key(above=0), Key(at_least=0, at_most=1)
COUNT = Key(int, at_least=1, at_most=10**6)
POWER = Key(at_least=1)  # below 1 the gradient of equal features is infinite

LOGIT_OBJECTIVES = {
    "kl_distillation": LogitObjective(paper="hinton2015distilling", keys={"temperature": POSITIVE}),
    "soft_distillation": LogitObjective(paper="touvron2021training", keys={"temperature": POSITIVE}),
    "hard_distillation": LogitObjective(paper="touvron2021training"),
    "decoupled_distillation": LogitObjective(
        paper="zhao2022decoupled",
        keys={"temperature": POSITIVE, "target_weight": WEIGHT, "nontarget_weight": WEIGHT},
        reads_labels=True,
    ),
    "dist": LogitObjective(
        paper="huang2022knowledge",
        keys={"temperature": POSITIVE, "inter_weight": WEIGHT, "intra_weight": WEIGHT},
        couples_samples=True,
    ),
    "normalized_distillation": LogitObjective(
        paper="yang2023knowledge", keys={"temperature": POSITIVE, "gamma": WEIGHT}, reads_labels=True
    ),
}
FEATURE_OBJECTIVES = {
    "logsum": FeatureObjective(
        paper="miles2024understanding",
        keys={"power": POWER, "normalization": Key(words=("batch", "l2", "layer", "none"))},
        couples_samples=True,
    ),
    "logsum_correlation": FeatureObjective(paper="miles2024understanding", keys={"power": POWER}, couples_samples=True),
    "logsum_difference": FeatureObjective(paper="miles2024understanding", keys={"power": POWER}, couples_samples=True),
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
PROJECTORS = {
    "none": ProjectorKind(),
    "linear": ProjectorKind(keys={"bias": Key(bool), "depth": Key(int, at_least=1, at_most=100), "width": COUNT}),
    "bn_dropout_linear": ProjectorKind(keys={"dropout": SHARE}),
    "orthonormal": ProjectorKind(),
    "review_fusion": ProjectorKind(),
    "contrastive": ProjectorKind(keys={"width": COUNT, "negatives": COUNT, "momentum": SHARE, "temperature": POSITIVE}),
}


def check_registration(what: str, function: Any, names: Mapping[str, Any], given: list[str]) -> str:
    """The name of what a user registers, once it can be called with what it is given.

    Args:
        what: the call, for messages.
        function: takes two positional arguments, and `given` by name.
        names: rows that are there already. The same name may be registered again, by a function of the same module.
        given: names of the arguments.

    Raises:
        UserError: no function, a name that is taken, an argument that it does not take, or a parameter without a value.
    """
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        raise UserError(f"{what}: needs a function or a class with a name, got {function!r}"[:300])
    if name in names:
        before = getattr(names[name], "function", None)
        if before is None or before.__module__ != function.__module__:
            raise UserError(f"{what}: the name {name} is taken; rename yours")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UserError(f"{what}: {name} is not written in Python; wrap it in a function of yours") from None
    kinds = {each.kind for each in parameters}
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    taken = {each.name for each in named[2:]}
    if inspect.Parameter.VAR_KEYWORD not in kinds and (missing := [key for key in given if key not in taken]):
        raise UserError(
            f"{what}: {name} has no parameter {', '.join(missing)} after the first two; add it, or leave it out of keys"
        )
    if unset := [each.name for each in named[2:] if each.default is each.empty and each.name not in given]:
        raise UserError(f"{what}: {name} has a parameter {', '.join(unset)} without a value; add it to keys, or give it a default")
    return name


def couples_samples(loss: str | None) -> bool:
    """Whether a loss, by its name in the recipe, must see the rows of the whole global batch."""
    row = LOGIT_OBJECTIVES.get(loss or "") or FEATURE_OBJECTIVES.get(loss or "")
    return row is not None and row.couples_samples


def parameters_of(*names: str | None) -> dict[str, Key]:
    """The keys of `distill.parameters` or `projector.parameters` that users' losses or projectors of these names read."""
    rows = [LOGIT_OBJECTIVES.get(name or "") or FEATURE_OBJECTIVES.get(name or "") for name in names]
    kinds = [PROJECTORS.get(name or "") for name in names]
    own = [row.keys for row in rows if row and row.function] + [kind.keys for kind in kinds if kind and kind.function]
    return {key: allowed for keys in own for key, allowed in keys.items()}


def section_keys(selector: str) -> dict[str, tuple[str, ...]]:
    """Of distill.kd_loss, distill.feature_loss or projector.kind: the keys of their section that each choice reads."""
    if selector == "projector.kind":
        return {name: () if kind.function else tuple(kind.keys) for name, kind in PROJECTORS.items()}
    if selector == "distill.kd_loss":
        return {name: ("kd_head", *(() if row.function else row.keys)) for name, row in LOGIT_OBJECTIVES.items()}
    return {
        name: (
            *("student_tap", "teacher_tap"),
            *(() if row.function else row.keys),
            *(("class_means",) if row.reads_class_means else ()),
        )
        for name, row in FEATURE_OBJECTIVES.items()
    }


def ranges() -> dict[str, Key]:
    """`distill.KEY` and `projector.KEY` -> what it may be, of all keys that are in the sections."""
    rows: list[LogitObjective | FeatureObjective] = [*LOGIT_OBJECTIVES.values(), *FEATURE_OBJECTIVES.values()]
    found = {f"distill.{key}": allowed for row in rows if not row.function for key, allowed in row.keys.items()}
    kinds = [kind for kind in PROJECTORS.values() if not kind.function]
    return found | {f"projector.{key}": allowed for kind in kinds for key, allowed in kind.keys.items()}
