"""What a task is to everything that trains it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from deit_kd.models import AnyTeacher
from deit_kd.models.features import TimmModel
from deit_kd.training.metrics import Clock, Tracker


class Task(Protocol):
    """What is learned: all that the loop, the run folder and train.py use of it.

    train.py makes one of `deit_kd.tasks.TASKS` with the arguments of `deit_kd.tasks.Classification`. A micro-batch is anything with
    `indices` [B], the places of its samples among the training images. The benchmark of steps subclasses `Classification`.

    Attributes:
        module: every trainable parameter behind one forward; prepared by `deit_kd.training.setup`.
        student: the bare part of it that is exported.
        teachers: one for each distillation of the recipe.
        steps_per_epoch: optimizer steps.
        accumulation_steps: micro-batches of a process in an optimizer step.
        images_per_step: of all processes.
        fingerprint: of the recipe.
        layout: how the global batch is cut, for checkpoints.
        depends_on: what a resumed run must find again; `deit_kd.training.run_start` sets it.
    """

    module: nn.Module
    student: nn.Module
    teachers: tuple[AnyTeacher, ...]
    steps_per_epoch: int
    accumulation_steps: int
    images_per_step: int
    fingerprint: str
    layout: dict[str, Any]
    depends_on: dict[str, Any]

    def train_batches(self, epoch: int, start_step: int, clock: Clock) -> Iterator[Any]:
        """Micro-batches of an epoch, from an optimizer step within it on."""

    def compute_terms(self, batch: Any, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """0-d tensors: `loss` and each of its terms; on detailed steps also what is only logged."""

    def sample_names(self, indices: Tensor) -> list[str]:
        """Where the samples of a micro-batch, its `indices` [B], come from, for people."""

    def evaluate(self, ema: nn.Module | None) -> dict[str, float]:
        """Metrics over the validation data, in percent, such as `top1`; of `ema` as `ema_top1`, of held-out images as `holdout_top1`."""

    def evaluate_teachers(self, tracker: Tracker, first: bool) -> None:
        """At the run's `first` start logs the metrics of the teachers; at each start warns of teachers near chance."""

    def stop_early(self, evaluations: list[dict[str, Any]]) -> bool:
        """Whether the evaluations so far show that more steps do not help."""

    def inspect(self) -> dict[str, Any]:
        """What to log of the trainable parts at each evaluation, such as the projector's spectrum."""

    def facts(self) -> dict[str, Any]:
        """What run.json says of data, layout and teachers; the keys are those of `deit_kd.tasks.setup.run_facts`."""

    def unsharded(self, student: nn.Module) -> TimmModel:
        """The student or its EMA in one piece: FSDP cuts it over processes."""
