"""What is well typed and still cannot be run."""

from __future__ import annotations

import math
import re

from deit_kd.recipe.schema import Recipe


def impossible(recipe: Recipe) -> list[str]:
    """Values and combinations that are well typed and still cannot be run."""
    r, data, aug, optim, run = recipe, recipe.data, recipe.augmentation, recipe.optim, recipe.run
    faults = []

    def need(condition: bool, fault: str) -> None:
        if not condition:
            faults.append(fault)

    def between(key: str, value: float, low: float, high: float) -> None:
        need(low <= value <= high, f"{key}: must lie in [{low:g}, {high:g}], got {value:g}")

    def at_least(key: str, value: float | str | None, low: float) -> None:
        need(not isinstance(value, (int, float)) or value >= low, f"{key}: must be at least {low:g}, got {value}")

    def positive(key: str, value: float | None) -> None:
        need(value is None or value > 0, f"{key}: must be above 0, got {value}")

    for key, count in {
        "epochs": r.epochs,
        "global_batch_size": r.global_batch_size,
        "data.train_images": data.train_images,
        "data.img_size": data.img_size,
        "optim.lr_base_batch_size": optim.lr_base_batch_size,
        "run.log_every_steps": run.log_every_steps,
        "run.eval_every_epochs": run.eval_every_epochs,
        "run.save_every_steps": run.save_every_steps,
        "run.keep_checkpoints": run.keep_checkpoints,
    }.items():
        at_least(key, count, 1)
    for key, amount in {
        "run.workers": run.workers,
        "augmentation.mixup": aug.mixup,
        "augmentation.cutmix": aug.cutmix,
        "augmentation.color_jitter": aug.color_jitter,
        "optim.warmup_lr": optim.warmup_lr,
        "optim.min_lr": optim.min_lr,
        "optim.weight_decay": optim.weight_decay,
        "optim.warmup_epochs": optim.warmup_epochs,
    }.items():
        at_least(key, amount, 0)
    for key, probability in {
        "augmentation.horizontal_flip": aug.horizontal_flip,
        "augmentation.random_erasing": aug.random_erasing,
        "augmentation.mixup_prob": aug.mixup_prob,
        "augmentation.mixup_switch_prob": aug.mixup_switch_prob,
        "augmentation.label_smoothing": aug.label_smoothing,
        "student.drop_path": r.student.drop_path,
    }.items():
        between(key, probability, 0, 1)
    at_least("data.num_classes", data.num_classes, 2)
    positive("evaluation.crop_pct", r.evaluation.crop_pct)
    positive("optim.lr", optim.lr)
    positive("optim.clip_grad", optim.clip_grad)
    need(r.ema_decay is None or 0 < r.ema_decay < 1, f"ema_decay: must lie between 0 and 1, or be null, got {r.ema_decay}")
    between("seed", r.seed, 0, 2**63 - 1)
    for beta in optim.betas:
        need(0 <= beta < 1, f"optim.betas: must lie in [0, 1), got {list(optim.betas)}")
    positive("optim.eps", optim.eps)
    need(all(map(math.isfinite, (*data.mean, *data.std))), "data.mean, data.std: must be finite")
    low, high = aug.crop_scale
    need(0 < low <= high <= 1, f"augmentation.crop_scale: needs 0 < low <= high <= 1, got [{low:g}, {high:g}]")
    need(min(data.std) > 0, f"data.std: must be above 0, got {list(data.std)}")
    need(
        optim.warmup_epochs < r.epochs or optim.warmup_epochs == 0,
        f"optim.warmup_epochs: {optim.warmup_epochs:g} leaves nothing of epochs: {r.epochs}; lower it",
    )
    need(
        not (aug.color_jitter and aug.auto_augment and "3a" not in aug.auto_augment),
        f"augmentation.color_jitter: has no effect beside auto_augment={aug.auto_augment} in timm; set it to 0",
    )
    for key in ("num_classes", "drop_path_rate", "img_size"):
        elsewhere = {"num_classes": "data.num_classes", "drop_path_rate": "student.drop_path", "img_size": "data.img_size"}[key]
        need(key not in r.student.model_args, f"student.model_args.{key}: state it as {elsewhere}")
    named = re.search(r"_patch(\d+)", r.student.name)
    patch = r.student.model_args.get("patch_size", int(named[1]) if named else None)
    if isinstance(patch, int) and patch > 0:
        need(data.img_size % patch == 0, f"data.img_size: {data.img_size} is not divisible by the patch size {patch}")

    sections = {"teacher": r.teacher, "projector": r.projector, "distill": r.distill}
    missing = [name for name, section in sections.items() if section is None]
    if missing and len(missing) < 3:
        faults.append(f"{', '.join(missing)}: null, but teacher, projector and distill go together; set all three or none")
    if r.distill:
        positive("distill.temperature", r.distill.temperature)
        positive("distill.power", r.distill.power)
        at_least("distill.kd_weight", r.distill.kd_weight, 0)
        at_least("distill.feature_weight", r.distill.feature_weight, 0)
        need(
            r.distill.kd_weight > 0 or r.distill.feature_weight > 0,
            "distill: kd_weight and feature_weight are both 0, so the teacher does nothing; set teacher, projector and distill to null",
        )
    return faults
