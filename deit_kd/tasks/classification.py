"""Image classification: the equation of a step.

    loss = label_weight * CE(class head, mixed labels)
         + for each teacher
             kd_weight      * kd_loss(head, teacher's logits)             T^2 KL(teacher || distillation head) in the paper
             feature_weight * feature_loss(projector(tap), teacher's tap)   LogSum of the mean patch token there

Every term has the same name here, in the recipe and in metrics.jsonl; of several teachers with the teacher's number behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from deit_kd.data import Batch, Source
from deit_kd.evaluation.metrics import near_chance
from deit_kd.models import AnyTeacher, StudentOutput, TeacherOutput
from deit_kd.models.features import TimmModel
from deit_kd.models.statistics import frozen_statistics
from deit_kd.recipe import Recipe, fingerprint
from deit_kd.tasks.closeness import closeness
from deit_kd.tasks.evaluate import StudentEvaluation, measure_teachers, spectrum, unsharded
from deit_kd.tasks.setup import make_distiller, make_loaders, make_teacher_terms, run_facts
from deit_kd.training.metrics import Clock, Tracker

Answers = dict[AnyTeacher, TeacherOutput]


class Classification:
    """The task that `deit_kd.training.loop.fit` trains: see `deit_kd.training.task.Task`.

    Args:
        recipe: what to train.
        accelerator: of this process.
        sources: train and val.
        teachers: one per distillation of the recipe, on the device.
        output: the run folder, where class means are kept.
        device_batch_size: the largest micro-batch of one device; None for no accumulation.
        warn: takes a line for people.
        compiled: torch.compile's mode for student, projectors and losses; None for none.

    Raises:
        UserError: see `make_loaders`, `make_distiller` and `make_teacher_terms`.
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
        self.train_loader, self.val_loader, holdout = make_loaders(recipe, accelerator, sources, device_batch_size, warn, teachers)
        train = self.train_loader.source
        self.num_classes, self.held_out = len(train.class_names), 0 if holdout is None else len(holdout.source)
        self.distiller = make_distiller(recipe, self.num_classes, teachers, train.labels, accelerator, compiled)
        self.module: nn.Module = self.distiller
        self.student, self.projectors = self.distiller.student, self.distiller.projectors
        self.teacher_terms, self.global_batch = make_teacher_terms(
            recipe, self.distiller, teachers, self.train_loader, output, accelerator, compiled
        )
        parts = (recipe.student, self.num_classes, recipe.data.img_size, accelerator.device)
        self.unsharded: Callable[[nn.Module], TimmModel] = lambda student: unsharded(student, *parts)
        self.evaluation = StudentEvaluation(self.distiller, self.val_loader, holdout, self.unsharded, accelerator, compiled)
        self.steps_per_epoch, self.accumulation_steps = self.train_loader.steps_per_epoch, self.train_loader.accumulation_steps
        self.images_per_step = self.train_loader.global_batch_size
        self.fingerprint, self.depends_on = fingerprint(recipe), dict[str, Any]()
        self.layout = {
            "processes": accelerator.num_processes,
            "accumulation_steps": self.accumulation_steps,
            "batch_statistics": recipe.batch_statistics,
        }
        self._answers: list[Answers] = []  # teachers' outputs for the next micro-batches of this step

    def train_batches(self, epoch: int, start_step: int, clock: Clock) -> Iterator[Batch]:
        """See `Task`. Under accumulation, losses that couple samples need the rows of all micro-batches first: an extra student forward."""
        stream = self.train_loader.epoch(epoch, start_step)
        gathers_first = self.accumulation_steps > 1 and any(terms.needs_global_batch() for terms in self.teacher_terms)
        while True:
            with clock.span("data", host=True):
                batches = list(islice(stream, self.accumulation_steps if gathers_first else 1))
            if not batches:
                return
            if gathers_first:
                self._answers = [self._ask(batch, clock) for batch in batches]
                with torch.no_grad(), self.global_batch.recording(), frozen_statistics(self.module):
                    for batch, answers in zip(batches, self._answers, strict=True):
                        self._compute_losses(batch, answers, clock, detailed=False)
            yield from batches

    def compute_terms(self, batch: Batch, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """The equation, and `agreement`, the share of equal decisions; on detailed steps also `closeness` of the features."""
        answers = self._answers.pop(0) if self._answers else self._ask(batch, clock)
        terms = self._compute_losses(batch, answers, clock, detailed)
        self.global_batch.advance()
        return terms

    def _ask(self, batch: Batch, clock: Clock) -> Answers:
        """The teachers' answers; before the student runs, so that the activations of both are never held at once."""
        teachers = dict.fromkeys(terms.teacher for terms in self.teacher_terms if terms.active(batch.epoch))
        with clock.span("teacher"), self.accelerator.autocast():
            return {teacher: teacher.answer(batch) for teacher in teachers}

    def _compute_losses(self, batch: Batch, answers: Answers, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """One student forward, and the equation above on it: `loss` and its terms."""
        everyone = self.teacher_terms
        active = {number: terms for number, terms in enumerate(everyone) if terms.active(batch.epoch)}
        torch.manual_seed(batch.seed)  # of dropout and drop path; it depends only on the position in the epoch
        with clock.span("student"):
            taps = [answers[t.teacher].tapped[t.tap] if t in active.values() and t.tap is not None else None for t in everyone]
            student: StudentOutput = self.module(batch.images, taps)
            values: dict[str, Tensor] = {}
            loss = batch.targets.new_zeros(())
            if self.recipe.label_weight:
                class_head = student.logits if any(t.teaches_tokens(batch.epoch) for t in everyone) else student.prediction()
                values["ce"] = F.cross_entropy(class_head.to(batch.targets.dtype), batch.targets)
                loss = self.recipe.label_weight * values["ce"]
            for number, terms in active.items():
                answer, suffix = answers[terms.teacher], f"_{number}" if len(everyone) > 1 else ""
                if terms.distill.kd_weight and terms.on("kd", batch.epoch):
                    values[f"kd{suffix}"] = kd = terms.kd(student, answer, batch)
                    loss = loss + terms.weight("kd", batch.epoch) * kd
                if terms.tap is not None and terms.on("feature", batch.epoch):
                    values[f"feature{suffix}"] = feature = terms.feature(student, answer, batch, self.projectors[number])
                    loss = loss + terms.weight("feature", batch.epoch) * feature
            for number, terms in enumerate(everyone):  # DDP expects a gradient for every parameter
                if not (number in active and terms.on("feature", batch.epoch)):
                    loss = loss + sum(0.0 * p.sum() for p in self.projectors[number].parameters())
        if 0 in active:
            first = answers[everyone[0].teacher]
            if everyone[0].distill.kd_weight:
                values["agreement"] = (student.prediction().argmax(1) == first.logits.argmax(1)).float().mean()
            if detailed and everyone[0].tap is not None:
                values |= closeness(everyone[0].distill, student.projected[0], first.tapped[everyone[0].tap])
        return {"loss": loss, **values}

    def sample_names(self, indices: Tensor) -> list[str]:
        """See `Task`."""
        return [self.train_loader.source.where(index) for index in indices.tolist()]

    def evaluate(self, ema: nn.Module | None = None) -> dict[str, float]:
        """See `StudentEvaluation`."""
        return self.evaluation(ema)

    def stop_early(self, evaluations: list[dict[str, Any]]) -> bool:
        """See `Task`: the held-out images did not improve for `finetune.patience_epochs`."""
        patience = self.recipe.finetune and self.recipe.finetune.patience_epochs
        if not (patience and evaluations):
            return False
        best = max(evaluations, key=lambda line: line["holdout_top1"])  # the first of equals
        return bool(evaluations[-1]["epoch"] - best["epoch"] >= patience)

    def evaluate_teachers(self, tracker: Tracker, first: bool) -> None:
        """See `Task`, and `measure_teachers`."""
        distills_logits = [bool(terms.distill.kd_weight) for terms in self.teacher_terms]
        if first and any(distills_logits):
            view = (self.recipe.data, self.recipe.evaluation)
            tracker.log("teacher", 0, measure_teachers(self.teachers, distills_logits, view, self.val_loader, self.accelerator))
        for line in near_chance(self.teachers, tracker.lines("teacher"), self.val_loader.source.labels, self.num_classes):
            tracker.say(line)

    def inspect(self) -> dict[str, Any]:
        """The first projector's `spectrum`."""
        return spectrum(self.projectors[0]) if self.projectors else {}

    def facts(self) -> dict[str, Any]:
        """See `run_facts`."""
        return run_facts(self.recipe, self.student, self.teachers, self.train_loader, self.val_loader.source, self.held_out)
