"""What is well typed and still cannot be run."""

from __future__ import annotations

import math
import re

from deit_kd.recipe.schema import Recipe, flatten

AT_LEAST = {
    **dict.fromkeys(("epochs", "global_batch_size", "data.train_images", "data.img_size", "optim.lr_base_batch_size"), 1),
    **dict.fromkeys((f"run.{key}" for key in ("log_every_steps", "eval_every_epochs", "save_every_steps", "keep_checkpoints")), 1),
    **dict.fromkeys((f"augmentation.{key}" for key in ("mixup", "cutmix", "color_jitter")), 0),
    **dict.fromkeys((f"optim.{key}" for key in ("warmup_lr", "min_lr", "weight_decay", "warmup_epochs")), 0),
    **dict.fromkeys(("seed", "run.workers", "distill.kd_weight", "distill.feature_weight"), 0),
    "data.num_classes": 2,
}
ABOVE_ZERO = (
    "evaluation.crop_pct", "optim.lr", "optim.eps", "optim.clip_grad", "distill.temperature", "distill.power", "ema_decay",
)  # fmt: skip
PROBABILITIES = (
    "student.drop_path",
    *(f"augmentation.{key}" for key in ("horizontal_flip", "random_erasing", "mixup_prob", "mixup_switch_prob", "label_smoothing")),
)
ELSEWHERE = {"num_classes": "data.num_classes", "drop_path_rate": "student.drop_path", "img_size": "data.img_size"}


def impossible(recipe: Recipe) -> list[str]:
    """Every value out of range and every combination that cannot be run, as `key: what is wrong`."""
    return _out_of_range(recipe) + _contradictions(recipe)


def _out_of_range(recipe: Recipe) -> list[str]:
    faults = []
    for key, value in flatten(recipe):
        if not isinstance(value, (int, float)):  # "auto", null, a name
            continue
        if not math.isfinite(value):
            faults.append(f"{key}: must be finite, got {value}")
        elif key == "seed" and value >= 2**63:
            faults.append(f"seed: must be below 2**63, got {value}")
        elif key in AT_LEAST and value < AT_LEAST[key]:
            faults.append(f"{key}: must be at least {AT_LEAST[key]}, got {value}")
        elif key in ABOVE_ZERO and value <= 0:
            faults.append(f"{key}: must be above 0, got {value}")
        elif key in PROBABILITIES and not 0 <= value <= 1:
            faults.append(f"{key}: must lie in [0, 1], got {value}")
    if recipe.ema_decay is not None and recipe.ema_decay >= 1:
        faults.append(f"ema_decay: must be below 1, or null, got {recipe.ema_decay}")
    low, high = recipe.augmentation.crop_scale
    if not 0 < low <= high <= 1:
        faults.append(f"augmentation.crop_scale: needs 0 < low <= high <= 1, got [{low:g}, {high:g}]")
    if not all(map(math.isfinite, recipe.data.mean)) or not all(0 < std < math.inf for std in recipe.data.std):
        faults.append(f"data.mean, data.std: must be finite, std above 0, got {list(recipe.data.mean)}, {list(recipe.data.std)}")
    if not all(0 <= beta < 1 for beta in recipe.optim.betas):
        faults.append(f"optim.betas: must lie in [0, 1), got {list(recipe.optim.betas)}")
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
    sections = {"teacher": r.teacher, "projector": r.projector, "distill": r.distill}
    missing = [name for name, section in sections.items() if section is None]
    if missing and len(missing) < 3:
        faults.append(f"{', '.join(missing)}: null, but teacher, projector and distill go together; set all three or none")
    if r.distill and not (r.distill.kd_weight or r.distill.feature_weight):
        faults.append("distill: both weights are 0, so the teacher does nothing; set teacher, projector and distill to null")
    return faults
