"""The one loop. What is learnt is a task's business; where it runs is Accelerate's."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_kd import checkpoint
from deit_kd.errors import UserError
from deit_kd.seed import derive_seed
from deit_kd.tracking import Clock, Tracker


class Task(Protocol):
    """What the loop knows of what is learnt."""

    module: nn.Module  # prepared; every trainable parameter behind one forward
    student: nn.Module  # the bare part of it that is exported
    steps_per_epoch: int

    def train_batches(self, epoch: int, start_step: int) -> Iterator[Any]:
        """Micro-batches of an epoch, from an optimiser step within it on."""

    def compute_terms(self, batch: Any, clock: Clock, detailed: bool) -> dict[str, Tensor]:
        """0-d tensors: `loss`, each of its terms, and on detailed steps what else is worth knowing."""

    def evaluate(self, ema: nn.Module | None) -> dict[str, float]:
        """Metrics over the validation data, those of `ema` under names that begin with ema_."""

    def inspect(self) -> dict[str, Any]:
        """What to record of the trainable parts beside metrics, such as the projector's spectrum."""


@dataclass(frozen=True)
class Loop:
    """The plain values that the loop needs."""

    seed: int
    total_steps: int
    accumulation_steps: int
    images_per_step: int
    clip_grad: float | None
    log_every_steps: int
    eval_every_epochs: int
    save_every_steps: int
    keep_checkpoints: int


class Stop:
    """Turns SIGINT and SIGTERM into a request that the loop meets after the step; a second signal ends the process at once."""

    def __enter__(self) -> Stop:
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; waits for all of them."""
        if accelerator.num_processes == 1:
            return self.requested
        asked = torch.tensor(int(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(asked, reduction="sum").item())


def fit(
    task: Task,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    loop: Loop,
    tracker: Tracker,
    folder: Path,
    ema: ModelEmaV3 | None = None,
    resume: Path | None = None,
) -> bool:
    """Trains to `loop.total_steps`, from a checkpoint if one is given.

    Returns:
        True when the run is complete, False when a signal stopped it; its state is saved either way.

    Raises:
        UserError: the loss is not finite, or the checkpoint does not fit.
    """
    state = _State(task, accelerator, optimizer, tracker, folder / "checkpoints", loop.keep_checkpoints, ema)
    step = state.restore(resume) if resume else 0
    clock, batches = Clock(accelerator.device), None
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    tracker.start(step)
    if step == 0:
        tracker.log("projector", step, task.inspect())
    elif _evaluation_is_due(loop, task, step) and not tracker.has("eval", step):  # stopped between saving and evaluating
        _evaluate(task, tracker, step, ema)
    window = _Window(step)
    task.module.train()

    with Stop() as stop:
        while step < loop.total_steps:
            epoch, step_of_epoch = divmod(step, task.steps_per_epoch)
            if batches is None or step_of_epoch == 0:
                batches = task.train_batches(epoch, step_of_epoch)
            lr = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            step += 1
            log = step % loop.log_every_steps == 0 or step == loop.total_steps
            for micro in range(loop.accumulation_steps):
                with clock.span("data", host=True):
                    batch = next(batches)
                torch.manual_seed(derive_seed(loop.seed, "model", step, micro, accelerator.process_index))
                last = micro == loop.accumulation_steps - 1
                with nullcontext() if last else accelerator.no_sync(task.module):
                    terms = task.compute_terms(batch, clock, detailed=log)
                    with clock.span("student"):
                        accelerator.backward(terms["loss"] / loop.accumulation_steps)
                tracker.add({name: value.detach() for name, value in terms.items()})
            with clock.span("student"):
                if loop.clip_grad is not None:
                    accelerator.clip_grad_norm_(parameters, loop.clip_grad)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.update(task.student)
            tracker.advance()

            if log:  # the only steps that wait for the device
                means = tracker.means()
                _refuse_nonfinite(means, window.step + 1, step, folder)
                speed = window.close(step, loop.images_per_step, clock)
                tracker.log("train", step, {"epoch": step / task.steps_per_epoch, "lr": lr, **means, **speed})
            stopping = (log or accelerator.num_processes == 1) and stop.agreed(accelerator)
            with window.paused():
                if stopping or step % loop.save_every_steps == 0 or step == loop.total_steps:
                    state.save(step)  # before evaluating, which can take long and fail
                if _evaluation_is_due(loop, task, step) and not stopping:
                    _evaluate(task, tracker, step, ema)
            if stopping:
                tracker.say(f"stopped at step {step}; the same command goes on from {folder / 'checkpoints'}")
                break
    return step >= loop.total_steps


def _evaluation_is_due(loop: Loop, task: Task, step: int) -> bool:
    return step % (loop.eval_every_epochs * task.steps_per_epoch) == 0 or step >= loop.total_steps


def _evaluate(task: Task, tracker: Tracker, step: int, ema: ModelEmaV3 | None) -> None:
    metrics = task.evaluate(None if ema is None else ema.module)
    tracker.log("eval", step, {"epoch": step / task.steps_per_epoch, **metrics})
    tracker.log("projector", step, task.inspect())
    task.module.train()


def _refuse_nonfinite(means: dict[str, float], first: int, last: int, folder: Path) -> None:
    if bad := [name for name, value in means.items() if not math.isfinite(value)]:
        raise UserError(
            f"{', '.join(bad)} became nan or inf between steps {first} and {last}; start again with --resume none and a lower optim.lr "
            f"or a clip_grad, or go on from {folder / 'checkpoints'} with run.precision=no if it was not"
        )


class _Window:
    """The steps since the last log: how many, and how long they took without evaluation and saving."""

    def __init__(self, step: int):
        self.step, self.started = step, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def close(self, step: int, images_per_step: int, clock: Clock) -> dict[str, float]:
        """Images a second, and seconds a step by part; the next window begins."""
        seconds, steps, now = clock.read(), step - self.step, time.perf_counter()
        rate = steps * images_per_step / (now - self.started)
        self.step, self.started = step, now
        return {"images_per_second": rate, **{f"seconds_{name}": value / steps for name, value in seconds.items()}}


class _State:
    """Everything of a run that changes: module, optimiser, EMA, scaler, and the open log window."""

    def __init__(
        self,
        task: Task,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        tracker: Tracker,
        folder: Path,
        keep: int,
        ema: ModelEmaV3 | None,
    ):
        self.task, self.accelerator, self.optimizer, self.tracker = task, accelerator, optimizer, tracker
        self.folder, self.keep, self.ema = folder, keep, ema
        self.bare = accelerator.unwrap_model(task.module)

    def save(self, step: int) -> None:
        window = self.tracker.state()
        _refuse_nonfinite(window["sums"], step, step, self.folder.parent)  # never let such a state push out a good one
        if self.accelerator.is_main_process:
            tensors, rest = checkpoint.pack_optimizer(self.optimizer)
            parts = {"module": self.bare.state_dict(), "optimizer": tensors}
            if self.ema is not None:
                parts["ema"] = self.ema.module.state_dict()
            scaler = self.accelerator.scaler
            state = {
                "optimizer": rest,
                "window": window,
                "scaler": scaler.state_dict() if scaler else None,
                "steps_per_epoch": self.task.steps_per_epoch,
            }
            checkpoint.save(self.folder, step, parts, state, self.keep)
        self.accelerator.wait_for_everyone()

    def restore(self, path: Path) -> int:
        """Puts everything back; returns the step that was reached."""
        parts, state = checkpoint.load(path)
        if state["steps_per_epoch"] != self.task.steps_per_epoch:
            raise UserError(
                f"{path}: was saved with {state['steps_per_epoch']} steps an epoch, this run has {self.task.steps_per_epoch}; "
                "give the same data and global_batch_size, or --resume none"
            )
        try:
            self.bare.load_state_dict(parts["module"])
            stated: list[dict[str, Any]] = [
                {key: group[key] for key in ("betas", "eps", "momentum", "weight_decay") if key in group}
                for group in self.optimizer.param_groups
            ]
            checkpoint.unpack_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
            for group, values in zip(self.optimizer.param_groups, stated, strict=True):
                group.update(values)  # the recipe's, not the checkpoint's
            if self.ema is not None:
                self.ema.module.load_state_dict(parts["ema"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: does not fit this recipe ({' '.join(str(error).split())[:200]})") from None
        self.tracker.restore(state["window"])
        return int(state["step"])
