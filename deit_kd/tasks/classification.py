"""Image classification: the equation of a step, and what is measured.

    loss = label_weight * CE(class head, mixed labels)
         + for each teacher
             kd_weight      * kd_loss(head, teacher's logits)             T^2 KL(teacher || distillation head) in the paper
             feature_weight * feature_loss(projector(tap), teacher's tap)   LogSum of the mean patch token there

Every term has the same name here, in the recipe and in metrics.jsonl; of several teachers with the teacher's number behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from deit_kd.data import Batch, Source
from deit_kd.distributed import fsdp
from deit_kd.distributed.global_batch import GlobalBatch
from deit_kd.evaluation.metrics import measure_student, near_chance
from deit_kd.models import AnyTeacher, CachedTeacher, Distiller, StudentOutput, TeacherOutput
from deit_kd.models.build import build_distiller, tokens
from deit_kd.models.features import TimmModel
from deit_kd.models.statistics import frozen_statistics
from deit_kd.recipe import Recipe, fingerprint
from deit_kd.tasks.closeness import closeness
from deit_kd.tasks.distillation import Terms
from deit_kd.tasks.measure import in_one_piece, measure_teachers, spectrum
from deit_kd.tasks.ready import make_loaders
from deit_kd.tasks.teacher_ahead import keep_for_this_stream
from deit_kd.teacher_cache.class_means import stated_means
from deit_kd.training.metrics import Clock, Tracker

_Taught = dict[AnyTeacher, TeacherOutput]


class Classification:
    """The task that `deit_kd.training.loop.fit` trains: see `deit_kd.training.task.Task`.

    Args:
        recipe: what to train.
        accelerator: prepares nothing here but says where and among how many.
        sources: train and val.
        teachers: one a distillation of the recipe, on the device.
        output: the run folder, where class means are kept.
        device_batch_size: the largest micro-batch of one device; None for no accumulation.
        warn: tells people something.
        compiled: torch.compile's mode for student, projectors and losses; None for none.

    Raises:
        UserError: a batch that does not divide, a cache of other images, or what `build_distiller` and `class_means.stated_means` refuse.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        sources: tuple[Source, Source],
        teachers: Sequence[AnyTeacher],
        output: Path,
        device_batch_size: int | None,
        warn: Callable[[str], None],
        compiled: str | None = None,
    ):
        self.recipe, self.accelerator, self.teachers = recipe, accelerator, tuple(teachers)
        cached = next((teacher for teacher in teachers if isinstance(teacher, CachedTeacher)), None)
        loaders = make_loaders(recipe, accelerator, sources, device_batch_size, warn, cached)
        self.train_loader, self.val_loader, self.holdout_loader = loaders
        train, tune, distillations = self.train_loader.source, recipe.finetune, recipe.distillations()
        self.num_classes, self.accumulation_steps = len(train.class_names), self.train_loader.accumulation_steps
        self.distills_logits = [bool(distillation.distill.kd_weight) for distillation in distillations]
        self.patience = tune and tune.patience_epochs
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.fingerprint, self.depends_on = fingerprint(recipe), dict[str, Any]()
        self.layout = {
            "processes": accelerator.num_processes,
            "accumulation_steps": self.accumulation_steps,
            "batch_statistics": recipe.batch_statistics,
        }
        distiller = build_distiller(recipe, self.num_classes, teachers, torch.from_numpy(train.labels))
        if recipe.batch_statistics == "global" and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            distiller = convert_sync_batchnorm(distiller)  # torch has it on CUDA alone
        license = distiller.student.pretrained_cfg.get("license") or "unknown"
        self.origin = {"license": license} if tune else {}
        if compiled:
            distiller.compile_forward(compiled)
        self._compiled, self._averaged = compiled, cast(Distiller | None, None)
        self.distiller, self.student, self.projectors = distiller, distiller.student, distiller.projectors
        self.module: nn.Module = distiller
        self.global_batch = GlobalBatch(accelerator, self.accumulation_steps)
        sections, here = (recipe.data, recipe.augmentation), self.train_loader.loader_config
        means = partial(stated_means, output, *sections, train, accelerator, here, recipe.global_batch_size)
        self.terms = [
            Terms(
                distillation, number, token or 0, teacher, recipe, means(distillation.distill, teacher), self.global_batch, compiled
            )
            for number, (distillation, token, teacher) in enumerate(
                zip(distillations, tokens(distillations, distiller.distillation_heads), teachers, strict=True)
            )
        ]
        self._ahead: list[_Taught] = []  # what teachers said of the micro-batches to come
        overlaps = recipe.run.overlap_teacher and accelerator.device.type == "cuda"
        self._stream = torch.cuda.Stream() if overlaps else None

    def train_batches(self, epoch: int, start_step: int, clock: Clock) -> Iterator[Batch]:
        """See `Task`. Accumulates rows first, where a term couples samples: the student then runs twice, teachers once."""
        stream = self.train_loader.epoch(epoch, start_step)
        looks_ahead = self.accumulation_steps > 1 and any(terms.needs_whole_batch() for terms in self.terms)
        while True:
            with self._beside():
                with clock.span("data", host=True):
                    batches = list(islice(stream, self.accumulation_steps if looks_ahead else 1))
                if looks_ahead or self._stream:
                    self._ahead = [self._ask(batch, clock) for batch in batches]
            if not batches:
                return
            if self._stream:
                keep_for_this_stream(batches, self._ahead)
            if looks_ahead:
                with torch.no_grad(), self.global_batch.recording(), frozen_statistics(self.module):
                    for batch, taught in zip(batches, self._ahead, strict=True):
                        self._equation(batch, taught, clock, detailed=False)
            yield from batches

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """With run.overlap_teacher on a GPU what is queued inside runs beside the step that is under way: it needs nothing of it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def compute_terms(self, batch: Batch, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """The equation, and `agreement`, the share of equal decisions; on detailed steps also `closeness` of the features."""
        taught = self._ahead.pop(0) if self._ahead else self._ask(batch, clock)
        terms = self._equation(batch, taught, clock, detailed)
        self.global_batch.advance()
        return terms

    def sample_names(self, indices: Tensor) -> list[str]:
        """See `Task`."""
        return [self.train_loader.source.where(index) for index in indices.tolist()]

    def _ask(self, batch: Batch, clock: Clock) -> _Taught:
        """What each teacher says; before the student runs, so that their activations are gone when its are kept."""
        teachers = dict.fromkeys(terms.teacher for terms in self.terms if terms.active(batch.epoch))
        with clock.span("teacher"), self.accelerator.autocast():
            return {each: each(batch.cached_teacher if isinstance(each, CachedTeacher) else batch.images) for each in teachers}

    def _equation(self, batch: Batch, taught: _Taught, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        asked = {number: terms for number, terms in enumerate(self.terms) if terms.active(batch.epoch)}
        torch.manual_seed(batch.seed)  # of dropout and drop path: a function of the place in the epoch
        with clock.span("student"):
            taps = [taught[t.teacher].tapped[t.tap] if t in asked.values() and t.tap is not None else None for t in self.terms]
            student: StudentOutput = self.module(batch.images, taps)
            values: dict[str, Tensor] = {}
            loss = batch.targets.new_zeros(())
            if self.recipe.label_weight:
                class_head = student.logits if any(t.teaches_tokens(batch.epoch) for t in self.terms) else student.prediction()
                values["ce"] = F.cross_entropy(class_head.to(batch.targets.dtype), batch.targets)
                loss = self.recipe.label_weight * values["ce"]
            for number, terms in asked.items():
                output, suffix = taught[terms.teacher], f"_{number}" if len(self.terms) > 1 else ""
                if terms.distill.kd_weight and terms.on("kd", batch.epoch):
                    values[f"kd{suffix}"] = kd = terms.kd(student, output, batch)
                    loss = loss + terms.weight("kd", batch.epoch) * kd
                if terms.tap is not None and terms.on("feature", batch.epoch):
                    values[f"feature{suffix}"] = feature = terms.feature(student, output, batch, self.projectors[number])
                    loss = loss + terms.weight("feature", batch.epoch) * feature
            for number, terms in enumerate(self.terms):  # else DDP waits for gradients that never come
                if not (number in asked and terms.on("feature", batch.epoch)):
                    loss = loss + sum(0.0 * p.sum() for p in self.projectors[number].parameters())
        if 0 in asked:
            first = taught[self.terms[0].teacher]
            if self.distills_logits[0]:
                values["agreement"] = (student.prediction().argmax(1) == first.logits.argmax(1)).float().mean()
            if detailed and self.terms[0].tap is not None:
                values |= closeness(self.terms[0].distill, student.projected[0], first.tapped[self.terms[0].tap])
        return {"loss": loss, **values}

    def whole(self, student: nn.Module) -> TimmModel:
        """See `Task`."""
        return in_one_piece(student, self.recipe, self.num_classes, self.accelerator.device)

    @torch.no_grad()
    def evaluate(self, ema: nn.Module | None = None) -> dict[str, float]:
        """top1 and top5 in percent and nll of the mean of the heads, each head's top1, over every validation image once."""
        distiller = Distiller(self.whole(self.student)) if fsdp.is_sharded(self.student) else self.distiller
        ema = None if ema is None else self.whole(ema)
        if self.accelerator.num_processes > 1:  # running statistics differ by process; what is exported are those of the first
            for model in (distiller, ema) if ema is not None else (distiller,):
                for buffer in model.buffers():
                    buffer.copy_(broadcast(buffer))
        metrics = measure_student(distiller, self.val_loader, self.accelerator)
        if self.holdout_loader:
            metrics |= measure_student(distiller, self.holdout_loader, self.accelerator, "holdout_")
        if ema is not None:
            if self._averaged is None or self._averaged.student is not ema:
                self._averaged = Distiller(ema)
                if self._compiled:
                    self._averaged.compile_forward(self._compiled)
            metrics |= measure_student(self._averaged, self.val_loader, self.accelerator, "ema_")
        return metrics

    def is_over(self, evaluations: list[dict[str, Any]]) -> bool:
        """See `Task`: the held out images have not been told better for `patience_epochs`."""
        if not (self.patience and evaluations):
            return False
        best = max(evaluations, key=lambda line: line["holdout_top1"])  # the first of equals
        return bool(evaluations[-1]["epoch"] - best["epoch"] >= self.patience)

    def evaluate_teachers(self) -> dict[str, float]:
        """See `measure_teachers`."""
        return measure_teachers(self.teachers, self.distills_logits, self.recipe, self.val_loader, self.accelerator)

    def warn_of_poor_teachers(self, tracker: Tracker) -> None:
        """Says loudly which teachers were measured to know next to nothing."""
        for line in near_chance(self.teachers, tracker.lines("teacher"), self.val_loader.source.labels, self.num_classes):
            tracker.say(line)

    def inspect(self) -> dict[str, Any]:
        """The first projector's `spectrum`."""
        return spectrum(self.projectors[0]) if self.projectors else {}
