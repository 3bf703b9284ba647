"""What is well typed and still cannot be run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from deit_kd.files.documents import short
from deit_kd.recipe.library import nearest
from deit_kd.recipe.objectives import (
    FEATURE_OBJECTIVES,
    LOGIT_OBJECTIVES,
    PROJECTORS,
    VECTORS,
    parameters_of,
    ranges,
    section_keys,
)
from deit_kd.recipe.partial import FAULTY, Undecidable
from deit_kd.recipe.schema import Distillation, Recipe, flatten

AT_LEAST = {
    **dict.fromkeys(("epochs", "global_batch_size", "data.train_images", "data.img_size", "optim.lr_base_batch_size"), 1),
    **dict.fromkeys((f"run.{key}" for key in ("log_every_steps", "eval_every_epochs", "save_every_steps", "keep_checkpoints")), 1),
    **dict.fromkeys((f"augmentation.{key}" for key in ("mixup", "cutmix", "color_jitter", "crop_padding")), 0),
    **dict.fromkeys((f"optim.{key}" for key in ("warmup_lr", "min_lr", "weight_decay", "warmup_epochs")), 0),
    **dict.fromkeys(("seed", "label_weight", "run.workers", "distill.kd_weight", "distill.feature_weight"), 0),
    **dict.fromkeys(("augmentation.repeats", "teacher.img_size", "finetune.patience_epochs"), 1),
    "data.num_classes": 2,
}
ABOVE_ZERO = (
    "evaluation.crop_pct", "optim.lr", "optim.eps", "optim.clip_grad", "optim.decay_rate", "ema_decay", "finetune.layer_decay",
)  # fmt: skip
PROBABILITIES = (
    "student.drop_path", "finetune.layer_decay", "finetune.holdout", "optim.momentum",
    *(f"augmentation.{key}" for key in ("horizontal_flip", "random_erasing", "mixup_prob", "mixup_switch_prob", "label_smoothing")),
)  # fmt: skip
# Larger numbers are typing errors: nothing runs with them, and much memory would be asked for.
AT_MOST = {
    **dict.fromkeys(("epochs", "global_batch_size", "augmentation.repeats"), 10**6),
    **dict.fromkeys(("data.img_size", "teacher.img_size"), 4096),
    **dict.fromkeys(("data.num_classes", "optim.lr_base_batch_size"), 10**6),
    "run.workers": 1024,
}
MOST_TOKENS = 65_536  # patches of an image: 4096 pixels a side in patches of 16; attention compares each with each
ELSEWHERE = {"num_classes": "data.num_classes", "drop_path_rate": "student.drop_path", "img_size": "data.img_size"}

# Which keys a choice reads, beside those that every choice reads; of losses and projectors the rows in objectives.py say it.
OPTIM_READS: dict[str, dict[str, tuple[str, ...]]] = {
    "optim.name": dict.fromkeys(("sgd", "momentum"), ("momentum",)),  # all others: betas and eps
    "optim.schedule": {"cosine": ("min_lr",), "multistep": ("milestones", "decay_rate")},
}
SELECTORS = (*OPTIM_READS, "projector.kind", "distill.kd_loss", "distill.feature_loss")


def keys_read(selector: str) -> dict[str, tuple[str, ...]]:
    """Each choice of one of the `SELECTORS`, and the keys of its section that only some choices read."""
    return OPTIM_READS.get(selector) or section_keys(selector)


def impossible(recipe: Recipe) -> list[str]:
    """Every value out of range and every combination that cannot be run, as `key: what is wrong`.

    Args:
        recipe: keys may be `Faulty`; what depends on them, or on a value out of range, is left out.
    """
    faults = [*_out_of_range(recipe), *_unknown_names(recipe)]
    for fault in list(faults):
        recipe = _without(recipe, fault.partition(": ")[0].split("."))
    for check in _checks(recipe):
        with suppress(Undecidable):
            for fault in check:
                faults.append(fault)  # noqa: PERF402 - what was found before a Faulty key is kept
    return faults


def _without(section: Any, path: list[str]) -> Any:
    """A section whose key is `Faulty`."""
    if not path or isinstance(section, dict):
        return FAULTY
    if isinstance(section, tuple):
        number = int(path[0])
        return (*section[:number], _without(section[number], path[1:]), *section[number + 1 :])
    return dataclasses.replace(section, **{path[0]: _without(getattr(section, path[0]), path[1:])})


def _checks(recipe: Recipe) -> Iterator[Iterable[str]]:
    yield from (check(recipe) for check in RECIPE_CHECKS)
    yield from (_unread(selector, "optim", recipe.optim) for selector in SELECTORS if selector.startswith("optim."))
    with suppress(Undecidable):
        for number, distillation in enumerate(recipe.distillations()):
            prefix = f"teachers.{number}." if recipe.teachers else ""
            for section, values in (("projector", distillation.projector), ("distill", distillation.distill)):
                yield from (
                    _unread(selector, prefix + section, values) for selector in SELECTORS if selector.startswith(f"{section}.")
                )
            yield from (check(distillation, prefix, recipe) for check in DISTILLATION_CHECKS)


def beyond_a_cache(recipe: Recipe) -> list[str]:
    """Why what the recipe compares cannot be read from a cache of pooled features and logits; empty if it can."""
    distillations = recipe.distillations()
    networks = len({distillation.teacher for distillation in distillations})
    if networks != 1:
        return [f"a cache holds what one teacher says, the recipe has {networks or 'none'}"]
    taps = [distillation.distill.teacher_tap for distillation in distillations if distillation.distill.feature_weight]
    return [f"a cache holds pooled features and logits, distill.teacher_tap is {tap}" for tap in taps if tap != "pooled"]


def _unread(selector: str, prefix: str, values: Any) -> Iterator[str]:
    """Keys that are not stated though the choice reads them, or stated though it does not."""
    name = selector.partition(".")[2]
    choice, choices = getattr(values, name), keys_read(selector)
    reads = choices.get(choice, ("betas", "eps") if selector == "optim.name" else ())
    optional = {key for keys in choices.values() for key in keys} | set(reads)
    optional |= {"betas", "eps"} if selector == "optim.name" else set()
    for key in sorted(optional):
        stated = getattr(values, key) is not None
        if key in reads and not stated:
            yield f"{prefix}.{key}: missing; {name}={choice} reads it"
        elif stated and key not in reads:
            chosen = "null" if choice is None else choice
            yield f"{prefix}.{key}: nothing reads it with {name}={chosen}; leave it out, or set it to null"


def _term(distillation: Distillation, prefix: str, recipe: Recipe, term: str) -> Iterator[str]:
    distill = distillation.distill
    loss, weight = getattr(distill, f"{term}_loss"), getattr(distill, f"{term}_weight")
    if weight and loss is None:
        yield f"{prefix}distill.{term}_weight: {weight:g}, but {term}_loss is null; set the weight to 0 or name a loss"
    if loss is None and (term in distill.ramp_epochs or term in distill.active_epochs):
        yield f"{prefix}distill.{term}_loss: null, but ramp_epochs or active_epochs name the term"


def _times(distillation: Distillation, prefix: str, recipe: Recipe, term: str) -> Iterator[str]:
    distill = distillation.distill
    if distill.ramp_epochs.get(term, 1) <= 0:  # type: ignore[call-overload]
        yield f"{prefix}distill.ramp_epochs.{term}: must be above 0; leave it out for no ramp"
    if term not in distill.active_epochs:
        return
    first, last = distill.active_epochs[term]  # type: ignore[index]
    if not 0 <= first < last:
        yield f"{prefix}distill.active_epochs.{term}: needs 0 <= first < last, got [{first}, {last}]"
    elif first >= recipe.epochs:
        yield f"{prefix}distill.active_epochs.{term}: begins at {first}, epochs: {recipe.epochs} end before; it would never be on"


def _does_nothing(distillation: Distillation, prefix: str, recipe: Recipe) -> Iterator[str]:
    if not (distillation.distill.kd_weight or distillation.distill.feature_weight):
        yield f"{prefix}distill: both weights are 0, so the teacher does nothing; set teacher, projector and distill to null"


def _projector(distillation: Distillation, prefix: str, recipe: Recipe) -> Iterator[str]:
    loss, kind = distillation.distill.feature_loss, distillation.projector.kind
    if loss is None:
        if kind != "none":
            yield f"{prefix}projector.kind: {kind}, but distill.feature_loss is null; set it to none"
        return
    wanted = FEATURE_OBJECTIVES[loss].projector
    owned = {row.projector for row in FEATURE_OBJECTIVES.values()} - {"none", None}
    if (wanted and kind != wanted) or (not wanted and kind in owned):
        yield f"{prefix}projector.kind: {loss} {f'needs {wanted}' if wanted else 'cannot use it'}, got {kind}"
    if kind == "contrastive" and distillation.projector.width == "teacher":
        yield f"{prefix}projector.width: must be a number with kind=contrastive, got teacher"


def _taps(distillation: Distillation, prefix: str, recipe: Recipe) -> Iterator[str]:
    distill, loss, faults = distillation.distill, distillation.distill.feature_loss, 0
    if loss is None:
        return
    taps = {"student_tap": distill.student_tap, "teacher_tap": distill.teacher_tap}
    for key, tap in taps.items():
        allowed = FEATURE_OBJECTIVES[loss].taps
        if tap is not None and ("a number" if isinstance(tap, int) else tap) not in allowed:
            faults += 1
            yield f"{prefix}distill.{key}: {loss} compares {', '.join(allowed)}, got {tap}"
    if distill.teacher_tap in VECTORS[1:] and not faults:
        yield f"{prefix}distill.teacher_tap: of a teacher pooled, spatial, a number or stages, got {distill.teacher_tap}"
    if None not in taps.values() and (distill.student_tap in VECTORS) != (distill.teacher_tap in VECTORS):
        yield (
            f"{prefix}distill.student_tap, teacher_tap: {distill.student_tap} and {distill.teacher_tap} are a vector and a map; "
            "choose two of one sort"
        )


def _parameters(distillation: Distillation, prefix: str, recipe: Recipe) -> Iterator[str]:
    distill, projector = distillation.distill, distillation.projector
    for section, stated, allowed in (
        ("distill", distill.parameters, parameters_of(distill.kd_loss, distill.feature_loss)),
        ("projector", projector.parameters, parameters_of(projector.kind)),
    ):
        for key in {**allowed, **stated}:
            name = f"{prefix}{section}.parameters.{key}"
            if key not in stated:
                yield f"{name}: missing; the {'losses' if section == 'distill' else 'projector'} of this recipe read it"
            elif key not in allowed:
                yield f"{name}: nothing reads it; leave it out"
            elif fault := allowed[key].fault(stated[key]):
                yield f"{name}: {fault}"


def _memory(distillation: Distillation, prefix: str, recipe: Recipe) -> Iterator[str]:
    if distillation.distill.feature_loss == "noise_contrastive" and (recipe.augmentation.mixup or recipe.augmentation.cutmix):
        yield f"{prefix}distill.feature_loss: noise_contrastive remembers images, which mixup and cutmix blend; set both to 0"


DISTILLATION_CHECKS: tuple[Callable[[Distillation, str, Recipe], Iterator[str]], ...] = (
    *(partial(check, term=term) for term in ("kd", "feature") for check in (_term, _times)),
    _does_nothing,
    _projector,
    _taps,
    _parameters,
    _memory,
)


def _unknown_names(recipe: Recipe) -> Iterator[str]:
    """Losses and projectors that no row names. Rows of users are there once their file is imported."""
    with suppress(Undecidable):
        for number, distillation in enumerate(recipe.distillations()):
            prefix = f"teachers.{number}." if recipe.teachers else ""
            named = (
                ("distill.kd_loss", distillation.distill.kd_loss, LOGIT_OBJECTIVES),
                ("distill.feature_loss", distillation.distill.feature_loss, FEATURE_OBJECTIVES),
                ("projector.kind", distillation.projector.kind, PROJECTORS),
            )
            for key, name, rows in named:
                with suppress(Undecidable):
                    if name is not None and name not in rows:
                        yield (
                            f"{prefix}{key}: must be {', '.join(rows)}, got {short(name)}{nearest(name, rows)}; what your own file "
                            "registers needs --import FILE"
                        )


def _out_of_range(recipe: Recipe) -> Iterator[str]:
    of_rows = ranges()
    for full_key, value in flatten(recipe):
        if not isinstance(value, (int, float)):  # "auto", null, a name
            continue
        key = re.sub(r"^teachers\.\d+\.(projector|distill)\.", r"\1.", full_key)
        key = re.sub(r"^teachers\.\d+\.", "teacher.", key)
        if not math.isfinite(value):
            yield f"{full_key}: must be finite, got {value}"
        elif key == "seed" and value >= 2**63:
            yield f"seed: must be below 2**63, got {value}"
        elif key in of_rows and not isinstance(value, bool) and (fault := of_rows[key].fault(value)):
            yield f"{full_key}: {fault}"
        elif key in AT_LEAST and value < AT_LEAST[key]:
            yield f"{full_key}: must be at least {AT_LEAST[key]}, got {value}"
        elif key in ABOVE_ZERO and value <= 0:
            yield f"{full_key}: must be above 0, got {value}"
        elif key in PROBABILITIES and not 0 <= value <= 1:
            yield f"{full_key}: must lie in [0, 1], got {value}"
        elif key in AT_MOST and value > AT_MOST[key]:
            yield f"{full_key}: must be at most {AT_MOST[key]:,}, got {value}"


def _ema(recipe: Recipe) -> Iterator[str]:
    if recipe.ema_decay is not None and recipe.ema_decay >= 1:
        yield f"ema_decay: must be below 1, or null, got {recipe.ema_decay}"


def _crop_scale(recipe: Recipe) -> Iterator[str]:
    low, high = recipe.augmentation.crop_scale or (1, 1)
    if not 0 < low <= high <= 1:
        yield f"augmentation.crop_scale: needs 0 < low <= high <= 1, got [{low:g}, {high:g}]"


def _normalization(recipe: Recipe) -> Iterator[str]:
    mean, std = ((0.5,) if isinstance(each, str) else each for each in (recipe.data.mean, recipe.data.std))  # auto
    if not all(map(math.isfinite, mean)) or not all(0 < each < math.inf for each in std):
        yield f"data.mean, data.std: must be finite, std above 0, got {list(recipe.data.mean)}, {list(recipe.data.std)}"


def _betas(recipe: Recipe) -> Iterator[str]:
    if not all(0 <= beta < 1 for beta in recipe.optim.betas or ()):
        yield f"optim.betas: must lie in [0, 1), got {list(recipe.optim.betas or ())}"


def _warmup(r: Recipe) -> Iterator[str]:
    if 0 < r.optim.warmup_epochs >= r.epochs:
        yield f"optim.warmup_epochs: {r.optim.warmup_epochs:g} leaves nothing of epochs: {r.epochs}; lower it"


def _color_jitter(r: Recipe) -> Iterator[str]:
    aug = r.augmentation
    if aug.color_jitter and aug.auto_augment and "3a" not in aug.auto_augment:
        yield f"augmentation.color_jitter: has no effect beside auto_augment={aug.auto_augment} in timm; set it to 0"


def _policy(r: Recipe) -> Iterator[str]:
    """Sections without a number, which timm passes over."""
    first, *sections = (r.augmentation.auto_augment or "").split("-")
    named = "t" if first == "rand" else None  # -tNAME is a set of operations
    if unread := [each for each in sections if not re.search(r"\d", each) and not (named and each.startswith(named))]:
        words = ", ".join(each or "''" for each in unread)
        yield f"augmentation.auto_augment: timm does not read {words} of {r.augmentation.auto_augment}; remove it, or give it a number"


def _elsewhere(r: Recipe) -> Iterator[str]:
    for key in sorted(ELSEWHERE.keys() & set(r.student.model_args)):
        yield f"student.model_args.{key}: state it as {ELSEWHERE[key]}"


def _patches(r: Recipe) -> Iterator[str]:
    patch, size = patch_of(r.student.name, r.student.model_args), r.data.img_size
    if isinstance(size, str) or patch is None:
        return
    if size % patch:
        yield f"data.img_size: {size} is not divisible by the patch size {patch}"
    if (tokens := (size // patch) ** 2) > MOST_TOKENS:
        yield f"data.img_size: {size} in patches of {patch} are {tokens:,} tokens, at most {MOST_TOKENS:,} can be used; choose a smaller one"


def patch_of(architecture: Any, arguments: Mapping[str, Any]) -> int | None:
    """Pixels a side of a network's (smaller) patch, as its arguments state it, else timm's name; None where neither does."""
    stated = arguments.get("patch_size")
    sides = stated if isinstance(stated, (list, tuple)) else [stated]
    if sides and all(type(side) is int and side > 0 for side in sides):
        return min(sides)
    named = re.search(r"_patch(\d{1,4})(?!\d)", architecture, flags=re.ASCII) if isinstance(architecture, str) else None
    return int(named[1]) or None if named else None


def _follows(r: Recipe) -> Iterator[str]:
    if (auto := r.follows_teacher()) and not r.distillations():
        yield f"{', '.join(auto)}: auto takes the teacher's, and this recipe has none; state numbers"


def _automatic_student(r: Recipe) -> Iterator[str]:
    if r.finetune is None and r.student.name == "auto":
        yield "student.name: auto, but finetune is null; name an architecture, or state finetune.weights"
    if r.finetune is not None and r.student.name == "auto" and r.student.model_args:
        yield "student.model_args: are those of finetune.weights with student.name=auto; set them to {}"


def _patience(r: Recipe) -> Iterator[str]:
    if r.finetune is not None and r.finetune.patience_epochs is not None and not r.finetune.holdout:
        yield "finetune.patience_epochs: needs finetune.holdout, a share of the training images to measure on"


def _together(r: Recipe) -> Iterator[str]:
    sections = {"teacher": r.teacher, "projector": r.projector, "distill": r.distill}
    missing = [name for name, section in sections.items() if section is None]
    if missing and len(missing) < 3:
        yield f"{', '.join(missing)}: null, but teacher, projector and distill go together; set all three or none"
    if len(missing) < 3 and r.teachers:
        yield "teachers: stated beside teacher; move everything into teachers and set teacher, projector and distill to null"


def _untaught(r: Recipe) -> Iterator[str]:
    if not r.label_weight and not any(
        distillation.distill.kd_weight and "kd" not in distillation.distill.active_epochs for distillation in r.distillations()
    ):
        yield "label_weight: 0, and no teacher's logits are distilled in every epoch; nothing would teach the heads"


def _one_crop(r: Recipe) -> Iterator[str]:
    if (r.augmentation.crop_scale is None) == (r.augmentation.crop_padding is None):
        yield "augmentation.crop_scale, crop_padding: state one of them, and set the other to null"


def _momentum(r: Recipe) -> Iterator[str]:
    if r.optim.momentum is not None and r.optim.momentum >= 1:
        yield f"optim.momentum: must be below 1, got {r.optim.momentum}"


def _milestones(r: Recipe) -> Iterator[str]:
    if any(m <= 0 or m >= r.epochs for m in r.optim.milestones or ()):
        yield f"optim.milestones: need 0 < milestone < {r.epochs} epochs, got {list(r.optim.milestones or ())}"


def _cached(r: Recipe) -> Iterator[str]:
    if not any(distillation.teacher.cache for distillation in r.distillations()):
        return
    yield from (f"teacher.cache: {reason}" for reason in beyond_a_cache(r))
    if any(distillation.distill.class_means == "auto" for distillation in r.distillations()):
        yield "distill.class_means: auto asks the teacher itself; name a file of deit-kd class-means, or set teacher.cache to null"


RECIPE_CHECKS = (
    _ema, _crop_scale, _normalization, _betas, _warmup, _color_jitter, _policy, _elsewhere, _patches, _follows, _automatic_student, _patience,
    _together, _untaught, _one_crop, _momentum, _milestones, _cached,
)  # fmt: skip
