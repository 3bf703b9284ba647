"""Image classification: the equation of a step, and what is measured.

    loss = CE(class head, mixed labels)
         + kd_weight      * T^2 KL(teacher || distillation head)
         + feature_weight * LogSum(projector(mean patch token), pooled teacher features)

Every term has the same name here, in the recipe and in metrics.jsonl.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

from deit_kd.data import Batch, EvaluationLoader, Placement, Source, TrainLoader, open_source
from deit_kd.data.loader import SKIPPED
from deit_kd.data.transforms import evaluation_transform, train_transform
from deit_kd.errors import UserError
from deit_kd.losses import kl_distillation, logsum_correlation, logsum_difference
from deit_kd.models import Distiller, StudentOutput, Teacher, TeacherOutput, build_projector, build_student, load_teacher
from deit_kd.models.distiller import feature_width
from deit_kd.recipe import Recipe
from deit_kd.seed import derive_seed
from deit_kd.tracking import Clock

FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "logsum_correlation": logsum_correlation,
    "logsum_difference": logsum_difference,
}


def build_teacher(recipe: Recipe, num_classes: int) -> Teacher | None:
    """The recipe's teacher, which gets the images that the student gets and knows its classes if logits are distilled."""
    if recipe.teacher is None or recipe.distill is None:
        return None
    torch.manual_seed(derive_seed(recipe.seed, "teacher"))  # random weights are then the same in every process and after a resume
    knows_classes = recipe.distill.kd_weight > 0 or recipe.teacher.weights == "random"
    return load_teacher(
        recipe.teacher.name,
        num_classes if knows_classes else None,
        weights=recipe.teacher.weights,
        image_mean=recipe.data.mean,
        image_std=recipe.data.std,
        precision=recipe.teacher.precision,
    )


def build_distiller(recipe: Recipe, num_classes: int, teacher: Teacher | None) -> Distiller:
    """Student and, when a feature loss needs it, projector; fresh weights that depend on the recipe's seed alone."""
    torch.manual_seed(recipe.seed)
    student = build_student(recipe.student, num_classes, recipe.data.img_size)
    projector = None
    if recipe.projector and recipe.distill and teacher and recipe.distill.feature_weight > 0:
        projector = build_projector(recipe.projector, feature_width(student), teacher.width)
    return Distiller(student, projector)


def open_data(recipe: Recipe, data: Path | None) -> tuple[Source, Source]:
    """(train, val) of the recipe.

    Raises:
        UserError: missing or empty data, or not what the recipe states of it.
    """
    train, val = (open_source(recipe.data.source, data, split) for split in ("train", "val"))
    stated = recipe.data.num_classes
    if stated not in ("auto", len(train.class_names)):
        raise UserError(
            f"{train.origin}: has {len(train.class_names)} classes, the recipe says data.num_classes={stated}; "
            f"set data.num_classes={len(train.class_names)} or give other data"
        )
    if recipe.data.train_images not in ("auto", len(train)):
        raise UserError(
            f"{train.origin}: has {len(train)} training images, the recipe says data.train_images={recipe.data.train_images}; "
            "pass --data DIR of the whole set, or set data.train_images=auto"
        )
    return train, val


class Classification:
    """The task that `deit_kd.engine.fit` trains: see `engine.Task`.

    Args:
        recipe: what to train.
        accelerator: prepares nothing here but says where and among how many.
        sources: train and val.
        teacher: on the device, or None.
        device_batch_size: the largest micro-batch of one device; None for no accumulation.
        warn: tells people something.

    Raises:
        UserError: a batch that does not divide, or labels of other names than the teacher's.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        sources: tuple[Source, Source],
        teacher: Teacher | None,
        device_batch_size: int | None,
        warn: Callable[[str], None],
    ):
        self.recipe, self.accelerator, self.teacher = recipe, accelerator, teacher
        train, val = sources
        self.num_classes = len(train.class_names)
        self.teacher_knows_labels = bool(recipe.distill and recipe.distill.kd_weight > 0)
        if teacher:
            teacher.gives_feature_map = False  # nothing here reads it
        if teacher and teacher.info.label_names and recipe.distill and recipe.distill.kd_weight > 0:
            _same_labels(teacher.info.label_names, train.class_names)
        if len(val) < accelerator.num_processes:
            raise UserError(f"{val.origin}: {len(val)} validation images are fewer than the {accelerator.num_processes} processes")
        self.accumulation_steps = accumulation(recipe.global_batch_size, accelerator.num_processes, device_batch_size)
        stated = recipe.run.workers
        workers = min(16, (os.cpu_count() or 1) // accelerator.num_processes) if stated == "auto" else stated
        placement = Placement(
            device=accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            workers=workers,
            on_bad_image=recipe.data.on_bad_image,
            warn=warn,
        )
        self.train_loader = TrainLoader(
            train,
            train_transform(recipe),
            recipe.augmentation,
            placement,
            num_classes=self.num_classes,
            seed=recipe.seed,
            global_batch_size=recipe.global_batch_size,
            accumulation_steps=self.accumulation_steps,
        )
        micro = self.train_loader.micro_batch_size
        if recipe.distill and recipe.distill.feature_weight > 0 and micro < 2:
            raise UserError(f"global_batch_size={recipe.global_batch_size}: leaves {micro} image a micro-batch, LogSum needs 2")
        self.val_loader = EvaluationLoader(val, evaluation_transform(recipe), placement, batch_size=micro)
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        distiller = build_distiller(recipe, self.num_classes, teacher)
        self.student = distiller.student
        self.module: nn.Module = distiller

    def train_batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """See `engine.Task`."""
        return self.train_loader.epoch(epoch, start_step)

    def compute_terms(self, batch: Batch, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """The equation. On detailed steps also `agreement` (share of equal decisions) and `cosine` of the features."""
        distill = self.recipe.distill
        teacher: TeacherOutput | None = None
        if self.teacher:  # first, so that its activations are gone before the student's are kept
            with clock.span("teacher"), self.accelerator.autocast():
                teacher = self.teacher(batch.images)
        with clock.span("student"):
            student: StudentOutput = self.module(batch.images)
            heads = student.prediction(), student.prediction()
            if distill and distill.kd_weight > 0 and student.dist_logits is not None:
                heads = student.logits, student.dist_logits
            class_head, distillation_head = heads
            terms = {"ce": F.cross_entropy(class_head.float(), batch.targets)}
            loss = terms["ce"]
            if distill and teacher and distill.kd_weight > 0:
                terms["kd"] = kl_distillation(distillation_head, teacher.logits, distill.temperature)
                loss = loss + distill.kd_weight * terms["kd"]
            if distill and teacher and student.projected is not None:
                feature_loss = FEATURE_LOSSES[distill.feature_loss]
                terms["feature"] = feature_loss(student.projected, teacher.features, distill.power)
                loss = loss + distill.feature_weight * terms["feature"]
        if detailed and teacher:
            terms |= _detail(student, teacher, self.teacher_knows_labels)
        return {"loss": loss, **terms}

    @torch.inference_mode()
    def evaluate(self, ema: nn.Module | None = None) -> dict[str, float]:
        """top1 and top5 in percent and nll of the mean of the heads, each head's top1, over every validation image once."""
        distiller = cast(Distiller, self.accelerator.unwrap_model(self.module))
        if self.accelerator.num_processes > 1:  # running statistics differ by process; what is exported are those of the first
            for model in (distiller, ema) if ema is not None else (distiller,):
                for buffer in model.buffers():
                    buffer.copy_(broadcast(buffer))
        metrics = self._measure(distiller, "")
        if ema is not None:
            metrics |= self._measure(Distiller(ema), "ema_")
        return metrics

    def _measure(self, distiller: Distiller, prefix: str) -> dict[str, float]:
        distiller.eval()

        def heads(images: Tensor) -> dict[str, Tensor]:
            output = distiller(images)
            if output.dist_logits is None:
                return {"": output.logits.float()}
            logits, dist_logits = output.logits.float(), output.dist_logits.float()
            return {"": (logits + dist_logits) / 2, "class_head_": logits, "distillation_head_": dist_logits}

        return self._count(heads, prefix, ("", "class_head_", "distillation_head_") if distiller.has_two_heads else ("",))

    @torch.inference_mode()
    def evaluate_teacher(self) -> dict[str, float]:
        """The teacher's top1 and top5 over the same images."""
        teacher = self.teacher
        assert teacher is not None
        return self._count(lambda images: {"": teacher(images).logits}, "teacher_", ("",))

    def _count(self, predict: Callable[[Tensor], dict[str, Tensor]], prefix: str, heads: tuple[str, ...]) -> dict[str, float]:
        """Sums over this process's images, then over the processes: an exact count, whatever their number."""
        names = ["images", *(f"{head}top1" for head in heads), "top5", "nll"]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.accelerator.device) for name in names}
        quiet = None if self.accelerator.is_main_process else True  # None: a bar on terminals only
        progress = tqdm(self.val_loader, "evaluating", delay=2, leave=False, disable=quiet)
        for images, labels in progress:
            with self.accelerator.autocast():
                outputs = predict(images)
            known = labels != SKIPPED
            new = {"images": known.sum()}
            for head, logits in outputs.items():
                top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                new[f"{head}top1"] = top[:, 0].sum()
                if not head:
                    new["top5"] = top.sum()
                    new["nll"] = F.cross_entropy(logits.double(), labels, ignore_index=SKIPPED, reduction="sum")
            for name, value in new.items():
                sums[name] += value
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        count = totals[0]
        if not count:
            raise UserError(f"{self.val_loader.source.origin}: no validation image can be read; mend them, or give other data")
        metrics = {prefix + name: total / count * (100 if "top" in name else 1) for name, total in zip(sums, totals, strict=True)}
        metrics[f"{prefix}images"] = int(count)
        return metrics

    @torch.no_grad()
    def inspect(self) -> dict[str, Any]:
        """The projector's singular values, and its effective rank exp(entropy of their shares): a collapse shows at once."""
        projector = cast(Distiller, self.accelerator.unwrap_model(self.module)).projector
        if projector is None:
            return {}
        weight = cast(Tensor, projector.weight).float()
        if not weight.isfinite().all():
            return {}
        values = torch.linalg.svdvals(weight)
        share = values / values.sum()
        rank = torch.special.entr(share).sum().exp()
        return {"projector_norm": values.norm().item(), "effective_rank": rank.item(), "singular_values": values.tolist()}


def accumulation(global_batch_size: int, num_processes: int, device_batch_size: int | None) -> int:
    """Micro-steps an optimiser step, so that none is larger than `device_batch_size`.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    if global_batch_size % num_processes:
        raise UserError(f"global_batch_size={global_batch_size} does not divide over {num_processes} processes; change one of them")
    share = global_batch_size // num_processes
    if device_batch_size is None or device_batch_size >= share:
        return 1
    if device_batch_size < 1 or share % device_batch_size:
        divisors = [n for n in range(1, share) if share % n == 0 and n <= max(device_batch_size, 1)]
        raise UserError(
            f"--device-batch-size {device_batch_size} does not divide the {share} images of a process "
            f"(global_batch_size {global_batch_size} over {num_processes}); use {divisors[-1]}"
        )
    return share // device_batch_size


def _detail(student: StudentOutput, teacher: TeacherOutput, same_labels: bool) -> dict[str, Tensor]:
    detail = {}
    if same_labels:
        detail["agreement"] = (student.prediction().argmax(1) == teacher.logits.argmax(1)).float().mean()
    if student.projected is not None:
        detail["cosine"] = F.cosine_similarity(student.projected.detach().float(), teacher.features, dim=1).mean()
    return detail


def _same_labels(teacher: tuple[str, ...], data: Any) -> None:
    if tuple(teacher) != tuple(data):
        first = next((a, b) for a, b in zip(teacher, data, strict=True) if a != b)
        raise UserError(
            f"teacher and data name their classes differently (the first: {first[0]!r} and {first[1]!r}); their logits cannot be "
            "compared: rename the folders, or distil features only with distill.kd_weight=0"
        )
