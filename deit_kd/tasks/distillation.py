"""The terms that one teacher adds to the loss: which functions of `deit_kd.losses` compare what, how strongly, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from deit_kd import losses
from deit_kd.data import Batch
from deit_kd.distributed.global_batch import GlobalBatch
from deit_kd.losses.shares import by_shares
from deit_kd.models import AnyTeacher, StudentOutput, TeacherOutput
from deit_kd.models.projectors.contrastive_memory import ContrastiveMemory
from deit_kd.recipe import Distill
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES, FeatureObjective, LogitObjective, couples_samples
from deit_kd.seed import derive_seed


class TeacherTerms:
    """The terms of one teacher.

    Args:
        distill: names losses, weights and taps.
        number: of the teacher among the recipe's distillations.
        head_index: which of the student's distillation heads learns from it.
        teacher: that is compared with.
        class_means: [K,E], for the losses that read them.
        global_batch: gathers the rows of losses that couple samples.
        epochs: of the run.
        seed: of the run.
        sees_global_batch: losses that couple samples see the rows of all processes and micro-batches.
        compiled: torch.compile's mode for the losses that compare two tensors; None for none.
    """

    def __init__(
        self,
        distill: Distill,
        number: int,
        head_index: int,
        teacher: AnyTeacher,
        class_means: Tensor | None,
        global_batch: GlobalBatch,
        *,
        epochs: int,
        seed: int,
        sees_global_batch: bool,
        compiled: str | None = None,
    ):
        self.distill, self.number, self.head_index, self.teacher = distill, number, head_index, teacher
        self.epochs, self.seed, self.sees_global_batch = epochs, seed, sees_global_batch
        self.class_means, self.global_batch = class_means, global_batch
        self.tap = distill.teacher_tap if distill.feature_weight else None
        self.functions: dict[str, Callable[..., Tensor]] = {}
        for name in (distill.kd_loss, distill.feature_loss):
            if name is not None:
                function = losses.function_of(name)
                self.functions[name] = torch.compile(function, dynamic=False, mode=compiled) if compiled else function

    def on(self, term: str, epoch: int) -> bool:
        """Whether an epoch is among the active ones of kd or feature; in the first epoch of a ramp a term is on with weight 0."""
        first, last = self.distill.active_epochs.get(term, (0, self.epochs))  # type: ignore[call-overload]
        return first <= epoch < last

    def weight(self, term: str, epoch: int) -> float:
        """The weight of kd or feature while it is on."""
        full = self.distill.kd_weight if term == "kd" else self.distill.feature_weight
        ramp = self.distill.ramp_epochs.get(term)  # type: ignore[call-overload]
        return full if ramp is None else full * min(1.0, epoch / ramp)

    def active(self, epoch: int) -> bool:
        """Whether a term of this teacher is on."""
        return bool((self.distill.kd_weight and self.on("kd", epoch)) or (self.tap is not None and self.on("feature", epoch)))

    def needs_global_batch(self) -> bool:
        """Whether a term couples samples, so that it must see rows of all processes and micro-batches."""
        kd_loss = self.distill.kd_loss if self.distill.kd_weight else None
        feature_loss = self.distill.feature_loss if self.tap is not None else None
        couple = couples_samples(kd_loss) or couples_samples(feature_loss)
        return feature_loss == "noise_contrastive" or (self.sees_global_batch and couple)

    def teaches_tokens(self, epoch: int) -> bool:
        """Whether a distillation head learns from this teacher alone, so that labels are for the class head."""
        return self.distill.kd_weight > 0 and self.on("kd", epoch) and self.distill.kd_head == "distillation"

    def kd(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> Tensor:
        """The logit term, on the head or heads that it teaches."""
        name, head = self.distill.kd_loss, self.distill.kd_head
        assert name is not None
        dist_logits = student.dist_logits
        own = dist_logits[self.head_index] if dist_logits else student.logits
        heads = {"class": [student.logits], "distillation": [own], "both": [student.logits, own]}[head or "class"]
        arguments = self._parameters(LOGIT_OBJECTIVES[name])
        if LOGIT_OBJECTIVES[name].reads_labels:
            arguments["labels"] = batch.targets.argmax(dim=1)  # under mixing the class with the larger share
        values = [self._loss(name, f"logits {n}", logits, teacher.logits, **arguments) for n, logits in enumerate(heads)]
        return sum(values[1:], values[0]) / len(values)

    def feature(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, projector: nn.Module) -> Tensor:
        """The feature term."""
        name, tap = self.distill.feature_loss, self.distill.teacher_tap
        assert name is not None
        assert tap is not None
        ours, theirs = student.projected[self.number], teacher.tapped[tap]
        assert ours is not None
        if name == "noise_contrastive":
            assert isinstance(projector, ContrastiveMemory)
            assert isinstance(ours, list)
            return self._contrastive(projector, ours[0], ours[1], batch)
        if isinstance(ours, list) and name == "hierarchical_context":
            return losses.hierarchical_context(ours, list(theirs))
        if isinstance(ours, list):
            pairs = enumerate(zip(ours, theirs, strict=True))
            return sum((self._compare(name, a, b, batch, stage) for stage, (a, b) in pairs), batch.targets.new_zeros(()))
        assert not isinstance(theirs, list)
        return self._compare(name, ours, theirs, batch)

    def _compare(self, name: str, student: Tensor, teacher: Tensor, batch: Batch, stage: int = 0) -> Tensor:
        if name == "dense_hard_distillation":
            return losses.dense_hard_distillation(student, teacher, batch.epoch / self.epochs)
        if name == "attention_transfer":
            return losses.attention_transfer(student, teacher)
        if FEATURE_OBJECTIVES[name].reads_class_means:
            assert self.class_means is not None
            # Mixed like the labels. Their smoothing lets the other classes' means in as well, as in the authors' DeiT code, where
            # they are those of the batch.
            means = batch.targets @ self.class_means
            if name == "mean_direction":
                return losses.mean_direction(student, means)
            return losses.norm_direction(student, teacher, means)
        if student.ndim == 4:
            student, teacher = (rearrange(each, "b c h w -> (b h w) c") for each in _one_size(student, teacher))
        return self._loss(name, f"features {stage}", student, teacher, **self._parameters(FEATURE_OBJECTIVES[name]))

    def _loss(self, name: str, where: str, student: Tensor, teacher: Tensor, **parameters: Any) -> Tensor:
        """A loss by its name, over all rows of the global batch if it couples samples."""
        function, gathers = self.functions[name], self.sees_global_batch and couples_samples(name)
        rows = {"student": student, "teacher": teacher, **{key: parameters.pop(key) for key in ("labels",) if key in parameters}}
        if not gathers:
            return function(rows.pop("student"), rows.pop("teacher"), **rows, **parameters)
        if steps := by_shares(name, parameters):  # a few numbers of the rows in their place
            function, rows = steps.of_shares, {"shares": steps.of_rows(student, teacher, **parameters)[None]}
        whole = {side: self.global_batch.gather_rows(f"{self.number} {where} {side}", each) for side, each in rows.items()}
        sides = [whole.pop(side) for side in ("student", "teacher", "shares") if side in whole]
        return self.global_batch.rescale_for_mean(function(*sides, **whole, **parameters))

    def _parameters(self, row: LogitObjective | FeatureObjective) -> dict[str, Any]:
        """What the recipe states of a loss, as arguments of its function."""
        stated = self.distill.parameters if row.function else vars(self.distill)
        return {key: stated[key] for key in row.keys}

    def _contrastive(self, memory: ContrastiveMemory, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """CRD. All processes hold the same memory, and update it once a step, whatever `batch_statistics` says."""

        def complete(name: str, rows: Tensor) -> Tensor:
            return self.global_batch.gather_rows(f"{self.number} {name}", rows.detach())

        scores = memory.scores(student, teacher, batch.indices, derive_seed(self.seed, "negatives", batch.epoch))
        first = complete("normalizer", scores.mean(dim=(1, 2))[None]).mean(dim=0)
        remembered = complete("student", student), complete("teacher", teacher), complete("indices", batch.indices)
        if self.global_batch.is_recording:
            return student.new_zeros(())
        scores = memory.normalize(scores, first)
        if self.global_batch.is_last:
            memory.update(*remembered)
        return losses.noise_contrastive(scores[0], memory.population) + losses.noise_contrastive(scores[1], memory.population)


def _one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B,C,H,W] with the larger average-pooled to the smaller."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
