"""What a task is to everything that trains it, and the plain values that the loop needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from deit_kd.data import EvaluationLoader, TrainLoader
from deit_kd.models import AnyTeacher
from deit_kd.models.features import TimmModel
from deit_kd.recipe import Recipe
from deit_kd.training.metrics import Clock, Tracker


class Task(Protocol):
    """What is learned: all that the loop, the run folder and train.py use of it.

    Attributes:
        module: every trainable parameter behind one forward; prepared by `deit_kd.training.setup`.
        student: the bare part of it that is exported.
        teachers: one for each distillation of the recipe.
        num_classes: K of the training data.
        train_loader: its images, and how the global batch is cut.
        val_loader: the images that are measured.
        holdout_loader: training images that are held out and measured too; None without `finetune.holdout`.
        steps_per_epoch: optimizer steps.
        accumulation_steps: micro-batches of a process in an optimizer step.
        distills_logits: for each distillation, whether its teacher's logits are compared.
        fingerprint: of the recipe.
        layout: how the global batch is cut, for checkpoints.
        depends_on: what a run that goes on from its checkpoints must find again.
        origin: what the card says of weights that training began with; empty from scratch.
    """

    recipe: Recipe
    accelerator: Accelerator
    module: nn.Module
    student: nn.Module
    teachers: tuple[AnyTeacher, ...]
    num_classes: int
    train_loader: TrainLoader
    val_loader: EvaluationLoader
    holdout_loader: EvaluationLoader | None
    steps_per_epoch: int
    accumulation_steps: int
    distills_logits: list[bool]
    fingerprint: str
    layout: dict[str, Any]
    depends_on: dict[str, Any]
    origin: dict[str, str]

    def train_batches(self, epoch: int, start_step: int, clock: Clock) -> Iterator[Any]:
        """Micro-batches of an epoch, from an optimizer step within it on."""

    def compute_terms(self, batch: Any, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """0-d tensors: `loss`, each of its terms, and on detailed steps what else is worth knowing."""

    def sample_names(self, indices: Tensor) -> list[str]:
        """Where the samples of a micro-batch, its `indices`, come from, for people."""

    def evaluate(self, ema: nn.Module | None) -> dict[str, float]:
        """Metrics over the validation data, those of `ema` under names that begin with ema_."""

    def evaluate_teachers(self) -> dict[str, float]:
        """The same of the teachers that know the labels."""

    def warn_of_poor_teachers(self, tracker: Tracker) -> None:
        """Says which teachers are near chance."""

    def is_over(self, evaluations: list[dict[str, Any]]) -> bool:
        """Whether what was measured so far says that more steps do not help."""

    def inspect(self) -> dict[str, Any]:
        """What to record of the trainable parts beside metrics, such as the projector's spectrum."""

    def whole(self, student: nn.Module) -> TimmModel:
        """The student or its EMA in one piece, where FSDP cuts it over processes."""


@dataclass(frozen=True)
class Loop:
    """The plain values that the loop needs."""

    total_steps: int
    accumulation_steps: int
    images_per_step: int
    clip_grad: float | None
    log_every_steps: int
    eval_every_epochs: int
    save_every_steps: int
    keep_checkpoints: int
    on_full_disk: str  # stop or go_on
    # Whether the host learns at each step if it counts. On a GPU it would wait, so there it learns when it logs or saves.
    reads_every_step: bool
