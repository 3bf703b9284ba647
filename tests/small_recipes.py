"""Recipes made small, and a few of them that together hold every kind of part."""

from __future__ import annotations

from typing import Any

from deit_kd import recipe as recipes

NAMES = recipes.names()
COMMON = [
    "data.source=image_folder",
    "data.num_classes=auto",
    "data.train_images=auto",
    "data.img_size=32",
    "global_batch_size=8",
    "run.workers=0",
    "run.log_every_steps=1",
]
SMALL_DEIT = ["student.model_args={patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}"]
SMALL_REGNET = ["name=regnety_002", "weights=random"]


def reduced(name: str) -> list[str]:
    """Overrides that leave the method as it is and take its size away."""
    if name.startswith("finetune"):
        return ["data.img_size=28", *(["teacher.weights=random", "teacher.name=regnety_002"] if name == "finetune:taught" else [])]
    if name.startswith("quickstart"):
        return ["data.img_size=28", *(["teacher.weights=random"] if name == "quickstart:distilled" else [])]
    if name == "cifar100_teacher":
        return []
    if name.startswith("deit_two_teachers"):  # a Swin takes images of its own size
        small = ["teachers.1.name=swin_tiny_patch4_window7_224", "teachers.1.weights=random", "teachers.1.img_size=224"]
        return [*SMALL_DEIT, *(f"teachers.0.{key}" for key in SMALL_REGNET), *small]
    if not name.startswith("deit"):
        memory = ["projector.negatives=64"] if name == "cifar100_crd" else []
        return ["teacher.weights=random", *memory]
    if name.startswith("deit_nkd"):
        return [*SMALL_DEIT, "teacher.name=deit3_small_patch16_224", "teacher.weights=random", "teacher.img_size=224"]
    return [*SMALL_DEIT, *(f"teacher.{key}" for key in SMALL_REGNET)]


def parts(name: str) -> set[Any]:
    """What a recipe is made of."""
    recipe, family = recipes.load(name), recipes.find(name)[0].parent.name
    found: set[Any] = {family, recipe.optim.name, len(recipe.distillations())}
    for distillation in recipe.distillations():
        distill, projector = distillation.distill, f"projector {distillation.projector.kind}"
        taps = {f"tap {'number' if isinstance(tap, int) else tap}" for tap in (distill.student_tap, distill.teacher_tap)}
        found |= {distill.kd_loss, distill.feature_loss, projector, *taps}
    return found


def one_of_each_kind() -> list[str]:
    every = {name: parts(name) for name in NAMES}
    lacking: set[Any] = set().union(*every.values())
    chosen = []
    while lacking:
        chosen.append(max(every, key=lambda name: len(every[name] & lacking)))
        lacking -= every[chosen[-1]]
    return chosen
