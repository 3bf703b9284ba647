"""What is well typed and still cannot be run."""

from __future__ import annotations

import math
import re
from typing import Any

from deit_kd.recipe.schema import Lesson, Recipe, flatten

AT_LEAST = {
    **dict.fromkeys(("epochs", "global_batch_size", "data.train_images", "data.img_size", "optim.lr_base_batch_size"), 1),
    **dict.fromkeys((f"run.{key}" for key in ("log_every_steps", "eval_every_epochs", "save_every_steps", "keep_checkpoints")), 1),
    **dict.fromkeys((f"augmentation.{key}" for key in ("mixup", "cutmix", "color_jitter", "crop_padding")), 0),
    **dict.fromkeys((f"optim.{key}" for key in ("warmup_lr", "min_lr", "weight_decay", "warmup_epochs")), 0),
    **dict.fromkeys((f"distill.{key}_weight" for key in ("kd", "feature", "target", "nontarget", "inter", "intra")), 0),
    **dict.fromkeys(("seed", "label_weight", "run.workers", "distill.gamma"), 0),
    **dict.fromkeys(("projector.depth", "projector.width", "projector.negatives", "augmentation.repeats", "teacher.img_size"), 1),
    "finetune.patience_epochs": 1,
    "distill.power": 1,  # below it the gradient of equal features is infinite
    "data.num_classes": 2,
}
ABOVE_ZERO = (
    "evaluation.crop_pct", "optim.lr", "optim.eps", "optim.clip_grad", "optim.decay_rate", "distill.temperature",
    "projector.temperature", "ema_decay", "finetune.layer_decay",
)  # fmt: skip
PROBABILITIES = (
    "student.drop_path", "finetune.layer_decay", "finetune.holdout", "projector.dropout", "projector.momentum", "optim.momentum",
    *(f"augmentation.{key}" for key in ("horizontal_flip", "random_erasing", "mixup_prob", "mixup_switch_prob", "label_smoothing")),
)  # fmt: skip
ELSEWHERE = {"num_classes": "data.num_classes", "drop_path_rate": "student.drop_path", "img_size": "data.img_size"}

# Which keys a choice reads, beside those that every choice reads. The keys of a loss are the parameters of its function.
_TAPS = ("student_tap", "teacher_tap")
READS: dict[str, dict[str, tuple[str, ...]]] = {
    "optim.name": dict.fromkeys(("sgd", "momentum"), ("momentum",)),  # all others: betas and eps
    "optim.schedule": {"cosine": ("min_lr",), "multistep": ("milestones", "decay_rate")},
    "projector.kind": {
        "none": (),
        "linear": ("bias", "depth", "width"),
        "bn_dropout_linear": ("dropout",),
        "orthonormal": (),
        "review_fusion": (),
        "contrastive": ("width", "negatives", "momentum", "temperature"),
    },
    "distill.kd_loss": {
        "kl_distillation": ("kd_head", "temperature"),
        "soft_distillation": ("kd_head", "temperature"),
        "hard_distillation": ("kd_head",),
        "decoupled_distillation": ("kd_head", "temperature", "target_weight", "nontarget_weight"),
        "dist": ("kd_head", "temperature", "inter_weight", "intra_weight"),
        "normalised_distillation": ("kd_head", "temperature", "gamma"),
    },
    "distill.feature_loss": {
        "logsum": (*_TAPS, "power", "normalisation"),
        "logsum_correlation": (*_TAPS, "power"),
        "logsum_difference": (*_TAPS, "power"),
        "layer_norm_smooth_l1": _TAPS,
        "norm_direction": (*_TAPS, "class_means"),
        "mean_direction": (*_TAPS, "class_means"),
        "mean_squared": _TAPS,
        "attention_transfer": _TAPS,
        "correlation_congruence": _TAPS,
        "noise_contrastive": _TAPS,
        "hierarchical_context": _TAPS,
        "dense_hard_distillation": _TAPS,
    },
}  # fmt: skip
# What a feature loss compares; those not named here take vectors, or the places of one map as so many samples.
VECTORS = ("pooled", "class_token", "distillation_token", "prefix_tokens")
COMPARES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("norm_direction", "mean_direction", "correlation_congruence", "noise_contrastive"), VECTORS),
    "attention_transfer": ("spatial", "stages", "a number"),
    "hierarchical_context": ("stages_and_pooled",),
    "dense_hard_distillation": ("dense_logits",),
}
# Projectors that belong to one loss, and losses that take the student's features as they are.
PROJECTORS = {
    "hierarchical_context": "review_fusion",
    "noise_contrastive": "contrastive",
    **dict.fromkeys(("attention_transfer", "correlation_congruence", "dense_hard_distillation"), "none"),
}


def impossible(recipe: Recipe) -> list[str]:
    """Every value out of range and every combination that cannot be run, as `key: what is wrong`."""
    faults = _out_of_range(recipe) + _contradictions(recipe) + _unread("optim", "optim", recipe.optim)
    several = bool(recipe.teachers)
    if any(lesson.teacher.cache for lesson in recipe.lessons()):
        faults += [f"teacher.cache: {reason}" for reason in beyond_a_cache(recipe)]
        if any(lesson.distill.class_means == "auto" for lesson in recipe.lessons()):
            faults.append(
                "distill.class_means: auto asks the teacher itself; name a file of deit-kd class-means, or set teacher.cache to null"
            )
    for number, lesson in enumerate(recipe.lessons()):
        faults += _lesson_faults(lesson, f"teachers.{number}." if several else "", recipe)
    return faults


def beyond_a_cache(recipe: Recipe) -> list[str]:
    """Why what the recipe compares cannot be read from a cache of pooled features and logits; empty if it can."""
    lessons = recipe.lessons()
    networks = len({lesson.teacher for lesson in lessons})
    if networks != 1:
        return [f"a cache holds what one teacher says, the recipe has {networks or 'none'}"]
    taps = [lesson.distill.teacher_tap for lesson in lessons if lesson.distill.feature_weight]
    return [f"a cache holds pooled features and logits, distill.teacher_tap is {tap}" for tap in taps if tap != "pooled"]


def _unread(section: str, prefix: str, values: Any) -> list[str]:
    """Keys that are not stated though they are read, or stated though nothing reads them."""
    faults, read, optional = [], dict[str, str](), set[str]()
    for selector in (key for key in READS if key.startswith(f"{section}.")):
        choices, choice = READS[selector], getattr(values, selector.partition(".")[2])
        reads = choices.get(choice, ("betas", "eps") if selector == "optim.name" else ())
        read |= dict.fromkeys(reads, f"{selector.partition('.')[2]}={choice}")
        optional |= {key for keys in choices.values() for key in keys} | ({"betas", "eps"} if selector == "optim.name" else set())
    for key in sorted(optional):
        stated = getattr(values, key) is not None
        if key in read and not stated:
            faults.append(f"{prefix}.{key}: missing; {read[key]} reads it")
        elif stated and key not in read:
            chosen = " and ".join(
                f"{name.partition('.')[2]}={getattr(values, name.partition('.')[2])}"
                for name in READS
                if name.startswith(f"{section}.")
            )
            faults.append(f"{prefix}.{key}: nothing reads it with {chosen}; leave it out, or set it to null")
    return faults


def _lesson_faults(lesson: Lesson, prefix: str, recipe: Recipe) -> list[str]:
    distill = lesson.distill
    faults = _unread("projector", f"{prefix}projector", lesson.projector) + _unread("distill", f"{prefix}distill", distill)
    for term, loss, weight in (
        ("kd", distill.kd_loss, distill.kd_weight),
        ("feature", distill.feature_loss, distill.feature_weight),
    ):
        if weight and loss is None:
            faults.append(f"{prefix}distill.{term}_weight: {weight:g}, but {term}_loss is null; set the weight to 0 or name a loss")
        if loss is None and (term in distill.ramp_epochs or term in distill.active_epochs):
            faults.append(f"{prefix}distill.{term}_loss: null, but ramp_epochs or active_epochs name the term")
        first, last = distill.active_epochs.get(term, (0, recipe.epochs))  # type: ignore[call-overload]
        if not 0 <= first < last:
            faults.append(f"{prefix}distill.active_epochs.{term}: needs 0 <= first < last, got [{first}, {last}]")
        elif first >= recipe.epochs:
            faults.append(
                f"{prefix}distill.active_epochs.{term}: begins at {first}, epochs: {recipe.epochs} end before; it would never be on"
            )
        if distill.ramp_epochs.get(term, 1) <= 0:  # type: ignore[call-overload]
            faults.append(f"{prefix}distill.ramp_epochs.{term}: must be above 0; leave it out for no ramp")
    if not (distill.kd_weight or distill.feature_weight):
        faults.append(
            f"{prefix}distill: both weights are 0, so the teacher does nothing; set teacher, projector and distill to null"
        )
    return faults + _feature_faults(lesson, prefix, recipe)


def _feature_faults(lesson: Lesson, prefix: str, recipe: Recipe) -> list[str]:
    distill, kind, faults = lesson.distill, lesson.projector.kind, list[str]()
    loss = distill.feature_loss
    if loss is None:
        if kind != "none":
            faults.append(f"{prefix}projector.kind: {kind}, but distill.feature_loss is null; set it to none")
        return faults
    wanted = PROJECTORS.get(loss)
    if (wanted and kind != wanted) or (not wanted and kind in ("review_fusion", "contrastive")):
        faults.append(f"{prefix}projector.kind: {loss} {f'needs {wanted}' if wanted else 'cannot use it'}, got {kind}")
    taps = {"student_tap": distill.student_tap, "teacher_tap": distill.teacher_tap}
    for key, tap in taps.items():
        allowed = COMPARES.get(loss, (*VECTORS, "spatial", "a number"))
        if tap is not None and ("a number" if isinstance(tap, int) else tap) not in allowed:
            faults.append(f"{prefix}distill.{key}: {loss} compares {', '.join(allowed)}, got {tap}")
    if distill.teacher_tap in VECTORS[1:] and not faults:
        faults.append(f"{prefix}distill.teacher_tap: of a teacher pooled, spatial, a number or stages, got {distill.teacher_tap}")
    if None not in taps.values() and (distill.student_tap in VECTORS) != (distill.teacher_tap in VECTORS):
        faults.append(
            f"{prefix}distill.student_tap, teacher_tap: {distill.student_tap} and {distill.teacher_tap} are a vector and a map; "
            "choose two of one sort"
        )
    if loss == "noise_contrastive" and (recipe.augmentation.mixup or recipe.augmentation.cutmix):
        faults.append(
            f"{prefix}distill.feature_loss: noise_contrastive remembers images, which mixup and cutmix blend; set both to 0"
        )
    return faults


def _out_of_range(recipe: Recipe) -> list[str]:
    faults = []
    for full_key, value in flatten(recipe):
        if not isinstance(value, (int, float)):  # "auto", null, a name
            continue
        key = re.sub(r"^teachers\.\d+\.(projector|distill)\.", r"\1.", full_key)
        if not math.isfinite(value):
            faults.append(f"{full_key}: must be finite, got {value}")
        elif key == "seed" and value >= 2**63:
            faults.append(f"seed: must be below 2**63, got {value}")
        elif key in AT_LEAST and value < AT_LEAST[key]:
            faults.append(f"{full_key}: must be at least {AT_LEAST[key]}, got {value}")
        elif key in ABOVE_ZERO and value <= 0:
            faults.append(f"{full_key}: must be above 0, got {value}")
        elif key in PROBABILITIES and not 0 <= value <= 1:
            faults.append(f"{full_key}: must lie in [0, 1], got {value}")
    if recipe.ema_decay is not None and recipe.ema_decay >= 1:
        faults.append(f"ema_decay: must be below 1, or null, got {recipe.ema_decay}")
    low, high = recipe.augmentation.crop_scale or (1, 1)
    if not 0 < low <= high <= 1:
        faults.append(f"augmentation.crop_scale: needs 0 < low <= high <= 1, got [{low:g}, {high:g}]")
    if not all(map(math.isfinite, recipe.data.mean)) or not all(0 < std < math.inf for std in recipe.data.std):
        faults.append(f"data.mean, data.std: must be finite, std above 0, got {list(recipe.data.mean)}, {list(recipe.data.std)}")
    if not all(0 <= beta < 1 for beta in recipe.optim.betas or ()):
        faults.append(f"optim.betas: must lie in [0, 1), got {list(recipe.optim.betas or ())}")
    return faults


def _contradictions(recipe: Recipe) -> list[str]:
    r, aug, optim = recipe, recipe.augmentation, recipe.optim
    faults = []
    if 0 < optim.warmup_epochs >= r.epochs:
        faults.append(f"optim.warmup_epochs: {optim.warmup_epochs:g} leaves nothing of epochs: {r.epochs}; lower it")
    if aug.color_jitter and aug.auto_augment and "3a" not in aug.auto_augment:
        faults.append(f"augmentation.color_jitter: has no effect beside auto_augment={aug.auto_augment} in timm; set it to 0")
    for key in ELSEWHERE.keys() & r.student.model_args.keys():
        faults.append(f"student.model_args.{key}: state it as {ELSEWHERE[key]}")
    named = re.search(r"_patch(\d+)", r.student.name)
    patch = r.student.model_args.get("patch_size", int(named[1]) if named else None)
    if isinstance(patch, int) and patch > 0 and r.data.img_size % patch:
        faults.append(f"data.img_size: {r.data.img_size} is not divisible by the patch size {patch}")
    if r.finetune is None and r.student.name == "auto":
        faults.append("student.name: auto, but finetune is null; name an architecture, or state finetune.weights")
    if r.finetune is not None and r.student.name == "auto" and r.student.model_args:
        faults.append("student.model_args: are those of finetune.weights with student.name=auto; set them to {}")
    if r.finetune is not None and r.finetune.patience_epochs is not None and not r.finetune.holdout:
        faults.append("finetune.patience_epochs: needs finetune.holdout, a share of the training images to measure on")
    sections = {"teacher": r.teacher, "projector": r.projector, "distill": r.distill}
    missing = [name for name, section in sections.items() if section is None]
    if missing and len(missing) < 3:
        faults.append(f"{', '.join(missing)}: null, but teacher, projector and distill go together; set all three or none")
    if r.teachers and len(missing) < 3:
        faults.append(
            "teachers: stated beside teacher; move everything into teachers and set teacher, projector and distill to null"
        )
    if not r.label_weight and not any(
        lesson.distill.kd_weight and "kd" not in lesson.distill.active_epochs for lesson in r.lessons()
    ):
        faults.append("label_weight: 0, and no teacher's logits are distilled in every epoch; nothing would teach the heads")
    if (aug.crop_scale is None) == (aug.crop_padding is None):
        faults.append("augmentation.crop_scale, crop_padding: state one of them, and set the other to null")
    if (optim.momentum is not None and optim.momentum >= 1) or any(m <= 0 or m >= r.epochs for m in optim.milestones or ()):
        faults.append(f"optim.momentum, optim.milestones: need momentum < 1 and 0 < milestones < {r.epochs} epochs")
    return faults
