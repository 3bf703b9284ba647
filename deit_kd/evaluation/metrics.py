"""Accuracy: an exact count over every image of a loader once, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from deit_kd.data import EvaluationLoader
from deit_kd.data.loader import SKIPPED
from deit_kd.errors import UserError
from deit_kd.models import AnyTeacher, Distiller, StudentOutput
from deit_kd.models.features import classifiers


@torch.no_grad()
def measure_student(distiller: Distiller, loader: EvaluationLoader, accelerator: Accelerator, prefix: str = "") -> dict[str, float]:
    """`measure` of the mean of the heads, and top1 of each head where there are several; leaves the student in evaluation mode."""
    distiller.eval()
    number = distiller.distillation_heads
    heads = ["class_head_", "distillation_head_", *(f"distillation_head_{n}_" for n in range(2, number + 1))] if number else []
    if not all(any(map(torch.any, head.parameters())) for head in classifiers(distiller.student)):
        heads = []  # fine-tuned with one head alone, the other is 0

    def predict(images: Tensor) -> dict[str, Tensor]:
        output: StudentOutput = distiller(images)
        each = zip(heads, (output.logits, *output.dist_logits), strict=False)
        return {"": output.prediction(), **dict(each)}

    return measure(predict, loader, accelerator, prefix, heads)


def near_chance(
    teachers: Sequence[AnyTeacher], measured: Sequence[Mapping[str, Any]], labels: np.ndarray, num_classes: int
) -> list[str]:
    """A warning for each teacher whose top-1 is hardly better than that of one answer for all validation images.

    Args:
        teachers: one a distillation; there is no warning for random ones, which are for tests.
        measured: lines of `Classification.evaluate_teachers`, of which the last counts; a teacher that was not measured is not in it.
        labels: [N] int of the validation images.
        num_classes: K.
    """
    if not measured:
        return []
    lines, count = [], max(1, len(labels))
    constant = float(np.bincount(labels).max(initial=0)) / count  # what the best single answer gets
    three_errors = 3 * math.sqrt(constant * (1 - constant) / count)
    enough = max(constant + three_errors, min(2 * constant, constant + 0.1 * (1 - constant)))
    for number, teacher in enumerate(dict.fromkeys(teachers)):
        known = measured[-1].get(f"teacher_{number}_top1" if number else "teacher_top1")
        if known is not None and known / 100 < enough and teacher.info.weights != "random":
            best = f", one answer for all images gets {100 * constant:.1f} %" if constant * num_classes > 1.05 else ""
            lines.append(
                f"WARNING: teacher {teacher.info.name} knows {known:.1f} % of the validation images, chance is {100 / num_classes:.1f} %{best}: IT TEACHES "
                "NEXT TO NOTHING. Check data.mean, data.std, data.img_size and teacher.img_size against what it was trained with, and that "
                "its classes are in the order of the data's"
            )
    return lines


@torch.no_grad()
def measure(
    predict: Callable[[Tensor], dict[str, Tensor]],
    loader: EvaluationLoader,
    accelerator: Accelerator,
    prefix: str = "",
    heads: list[str] | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent and nll, and the number of images.

    Args:
        predict: images [B,3,H,W] -> logits [B,K] of the prediction under the name "", and of each of `heads`.
        loader: this process's share of the images.
        accelerator: sums over the processes.
        prefix: of the metrics' names.
        heads: of which top1 is counted as well.

    Raises:
        UserError: no image could be read.
    """
    names = ["images", "top1", *(f"{head}top1" for head in heads or ()), "top5", "nll"]
    sums = {name: torch.zeros((), dtype=torch.float64, device=accelerator.device) for name in names}
    quiet = None if accelerator.is_main_process else True  # None: a bar on terminals only
    for images, labels in tqdm(loader, "evaluating", delay=2, leave=False, disable=quiet):
        with accelerator.autocast():
            outputs = predict(images)
        known = labels != SKIPPED
        sums["images"] += known.sum()
        for head, logits in outputs.items():
            top = logits.float().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            sums[f"{head}top1"] += top[:, 0].sum()
            if not head:
                sums["top5"] += top.sum()
                sums["nll"] += F.cross_entropy(logits.double(), labels, ignore_index=SKIPPED, reduction="sum")
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
    count = totals[0]
    if not count:
        raise UserError(f"{loader.source.origin}: no validation image can be read; mend them, or give other data")
    metrics = {prefix + name: total / count * (100 if "top" in name else 1) for name, total in zip(sums, totals, strict=True)}
    metrics[f"{prefix}images"] = int(count)
    return metrics
