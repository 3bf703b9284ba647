"""The networks that a recipe names, built: teachers, and the student with its projectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit_kd.data.sources.folders import order_in_doubt
from deit_kd.errors import UserError
from deit_kd.files.warn import warn
from deit_kd.models import AnyTeacher, CachedTeacher, Distiller, build_student, load_student, load_teacher
from deit_kd.models.distiller import build_distillation_projector, probe_student
from deit_kd.models.facts import facts_of, locate
from deit_kd.models.features import TimmModel
from deit_kd.models.loading import architecture_of
from deit_kd.models.summary import Plan, count_networks
from deit_kd.models.teacher import doubts, other_classes
from deit_kd.recipe import Distillation, Finetune, Recipe, nearest
from deit_kd.recipe.checks import impossible
from deit_kd.seed import derive_seed


def build_teachers(recipe: Recipe, class_names: Sequence[str] | int | None, pretrained: bool = True) -> list[AnyTeacher]:
    """The teacher of each distillation of the recipe; distillations that name the same teacher share one object.

    A teacher sees the student's images, and must have the data's classes if its logits are distilled. `acceleration.prepare` folds it
    and then puts it into half precision, if that is stated. Of a teacher with a cache only the cache is opened.

    Args:
        recipe: names them.
        class_names: of the data; a number where there are no data yet, None if unknown.
        pretrained: False is for counting: random weights, whatever the recipe says, with the same classes.

    Raises:
        UserError: see `load_teacher` and `CachedTeacher`; labels of other names, or images of a size that a teacher refuses.
    """
    teachers: list[AnyTeacher] = []
    distillations = recipe.distillations()
    for distillation in distillations:
        config, same = distillation.teacher, [other for other in distillations if other.teacher == distillation.teacher]
        first = distillations.index(same[0])
        if first < len(teachers):
            teachers.append(teachers[first])
            continue
        compares_logits = any(each.distill.kd_weight or each.distill.teacher_tap == "dense_logits" for each in same)
        number = class_names if class_names is None or isinstance(class_names, int) else len(class_names)
        teacher: AnyTeacher
        if config.cache and pretrained:
            teacher = CachedTeacher(Path(config.cache), any(each.distill.feature_weight for each in same), compares_logits)
            if compares_logits and teacher.num_classes != number:
                raise UserError(
                    f"teacher.cache={config.cache}: its teacher knows {teacher.num_classes} classes, the data has {number}; distil "
                    "features only with distill.kd_weight=0"
                )
        else:
            # Random weights are the same in every process.
            torch.manual_seed(derive_seed(recipe.seed, "teacher", *([first] if first else [])))
            teacher = load_teacher(
                config.name,
                number
                if config.weights == "random" or (compares_logits and (pretrained or config.weights != "pretrained"))
                else None,
                weights=config.weights if pretrained else "random",
                image_mean=recipe.data.mean,
                image_std=recipe.data.std,
                precision=config.precision if pretrained else "auto",
                img_size=config.img_size,
                taps=[tap for each in same if (tap := each.distill.teacher_tap) is not None and each.distill.feature_weight],
                folds_first=True,
            )
            for doubt in doubts(teacher, recipe.data.img_size, recipe.data.mean) if config.weights != "random" else ():
                warn(doubt)
            if compares_logits and number not in (None, teacher.num_classes):  # when counting; else `load_teacher` raises it
                raise UserError(other_classes(config.name, teacher.num_classes, number))
            teacher.probe(torch.zeros(1, 3, recipe.data.img_size, recipe.data.img_size))  # one of a fixed size may refuse it
        if compares_logits and teacher.info.label_names and isinstance(class_names, Sequence):
            _same_labels(teacher.info.label_names, class_names)
        elif (
            compares_logits
            and isinstance(class_names, Sequence)
            and (order := order_in_doubt(f"teacher {config.name}", class_names))
        ):
            warn(order)
        teachers.append(teacher)
    return teachers


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with auto replaced: the architecture of the weights to fine-tune, the first teacher's image size and normalization.

    Raises:
        UserError: weights or a teacher that cannot be read; weights of another architecture than it names; what then does not fit.
    """
    if auto := recipe.follows_teacher():
        first = recipe.distillations()[0].teacher
        if first.name.startswith("hf-hub:"):
            locate(
                first.name, first.weights
            )  # its configuration is there, too, and where it is not the hub's client tries for long
        facts = facts_of(first.name, first.weights)
        data = replace(recipe.data, **{key: getattr(facts, key) for key in (key.partition(".")[2] for key in auto)})
        recipe = replace(recipe, data=data)
        if faults := impossible(recipe):
            raise UserError("\n  ".join([f"with {', '.join(auto)} of teacher {first.name}: {len(faults)} faults", *faults]))
    if recipe.finetune is None:
        return recipe
    if recipe.finetune.weights.startswith("hf-hub:"):
        locate(recipe.finetune.weights)
    name, arguments = architecture_of(recipe.finetune.weights)
    if recipe.student.name not in ("auto", name):
        raise UserError(f"student.name={recipe.student.name}: {recipe.finetune.weights} is a {name}; set student.name=auto")
    stated = recipe.student.model_args if recipe.student.name == name else arguments
    resolved = replace(recipe, student=replace(recipe.student, name=name, model_args=stated))
    if faults := impossible(resolved):
        raise UserError("\n  ".join([f"with {recipe.finetune.weights}: {len(faults)} faults", *faults]))
    return resolved


def build_distiller(
    recipe: Recipe, num_classes: int, teachers: Sequence[AnyTeacher], labels: Tensor | None = None, pretrained: bool = True
) -> Distiller:
    """Student and a projector for each distillation, with fresh weights that depend on the recipe's seed alone, or with those to fine-tune.

    Args:
        recipe: names them.
        num_classes: of the data.
        teachers: one a distillation, on the CPU or the meta device like the result.
        labels: [N] int of the training images, for a contrastive memory.
        pretrained: False is for counting: random weights, whatever the recipe says.

    Raises:
        UserError: a head, tap or width that does not fit, or weights that cannot be read.
    """
    torch.manual_seed(recipe.seed)
    if recipe.finetune is not None and pretrained:
        student = load_student(recipe.finetune.weights, num_classes, recipe.data.img_size, drop_path=recipe.student.drop_path)
        _freeze(student.train(), recipe.finetune)
    else:
        student = build_student(recipe.student, num_classes, recipe.data.img_size)
    distillations = recipe.distillations()
    device = next(student.parameters()).device
    image = torch.zeros(1, 3, recipe.data.img_size, recipe.data.img_size, device=device)
    probe_student(student, image)
    projectors = [
        build_distillation_projector(distillation, student, teacher, image, labels, derive_seed(recipe.seed, "memory"))
        for distillation, teacher in zip(distillations, teachers, strict=True)
    ]
    distiller = Distiller(student, projectors, [distillation.distill.student_tap for distillation in distillations])
    heads = distiller.distillation_heads
    used = sum(index is not None for index in head_indices(distillations, heads))
    if heads > 1 and used not in (0, heads):
        raise UserError(
            f"student.name={recipe.student.name}: has {heads} distillation tokens, and the logits of {used} teachers go to them; state "
            f"{heads} with kd_head=distillation or both, or take a student with one token"
        )
    for distillation in distillations:
        if distillation.distill.kd_weight and distillation.distill.kd_loss == "decoupled_distillation" and num_classes < 3:
            raise UserError(
                f"distill.kd_loss=decoupled_distillation: needs 3 classes, the data has {num_classes}; use kl_distillation"
            )
        if distillation.distill.kd_weight and distillation.distill.kd_head != "class" and not heads:
            raise UserError(
                f"distill.kd_head={distillation.distill.kd_head}: {recipe.student.name} has no distillation head; use kd_head=class, or a "
                "student such as deit_tiny_distilled_patch16_224"
            )
    return distiller


def build_models(recipe: Recipe, num_classes: int | None) -> tuple[int, list[AnyTeacher], Distiller]:
    """(classes, the teacher of each distillation, student with projectors) on the meta device, where weights take no memory.

    Args:
        recipe: names them, `resolve`d.
        num_classes: of the data; None for as many as the recipe states, or the first teacher has, or ImageNet.

    Raises:
        UserError: as `build_teachers` and `build_distiller`.
    """
    stated = num_classes or (recipe.data.num_classes if isinstance(recipe.data.num_classes, int) else None)
    with torch.device("meta"), torch.no_grad():
        teachers = build_teachers(recipe, stated, pretrained=False)
        classes = stated or (teachers[0].num_classes if teachers else 1000)
        return classes, teachers, build_distiller(recipe, classes, teachers, pretrained=False)


def make_plan(recipe: Recipe, num_classes: int | None) -> Plan:
    """Builds teachers and student without memory for their weights and counts them.

    Args:
        recipe: what would be trained.
        num_classes: of the data; None for as many as the teacher's architecture has by default, when there are no data yet.

    Raises:
        UserError: a name or an argument that timm refuses, or taps and widths that do not fit.
    """
    recipe = resolve(recipe)
    classes, teachers, distiller = build_models(recipe, num_classes)
    couples = recipe.batch_statistics == "global"
    return count_networks(distiller, teachers, recipe.distillations(), recipe.student.name, classes, recipe.data.img_size, couples)


@torch.no_grad()
def _freeze(student: TimmModel, finetune: Finetune) -> None:
    heads = student.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    parameters = dict(student.named_parameters())
    if finetune.heads != "both" and len(heads) != 2:
        raise UserError(f"finetune.heads={finetune.heads}: {finetune.weights} has {len(heads)} heads; set it to both")
    unused = {"class": heads[1:], "distillation": heads[:1], "both": ()}[finetune.heads]
    for prefix in finetune.frozen:
        chosen = [
            name
            for name in parameters
            if (name.rpartition(".")[0] not in heads if prefix == "backbone" else name.startswith(prefix))
        ]
        if not chosen:
            known = {".".join(name.split(".")[:depth]) for name in parameters for depth in (1, 2)}
            raise UserError(
                f"finetune.frozen: {finetune.weights} has no parameter that begins with {prefix}{nearest(prefix, known)}"
            )
        for name in chosen:
            parameters[name].requires_grad_(False)
    for name, parameter in parameters.items():
        if name.rpartition(".")[0] in unused:
            parameter.zero_().requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("finetune.frozen: leaves nothing to train; shorten it")


def head_indices(distillations: Sequence[Distillation], heads: int) -> list[int | None]:
    """The distillation head that each distillation trains, in order; None: it trains none. A single head serves all."""
    trains = [
        bool(distillation.distill.kd_weight) and distillation.distill.kd_head in ("distillation", "both")
        for distillation in distillations
    ]
    return [min(sum(trains[:n]), max(heads, 1) - 1) if each else None for n, each in enumerate(trains)]


def _same_labels(teacher: Sequence[str], data: Sequence[Any]) -> None:
    if tuple(teacher) != tuple(data):
        first = next((a, b) for a, b in zip(teacher, data, strict=True) if a != b)
        raise UserError(
            f"teacher and data name their classes differently (the first: {first[0]!r} and {first[1]!r}); their logits cannot be "
            "compared: rename the folders, or distil features only with distill.kd_weight=0"
        )
