"""The training loop, for any `Task`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3

from deit_kd.recipe import Run
from deit_kd.training.best import Best
from deit_kd.training.metrics import Clock, Tracker, Window
from deit_kd.training.nonfinite import StepGuard, StepTerms
from deit_kd.training.signals import Stop, Stopped, stop_message
from deit_kd.training.state import RunState
from deit_kd.training.task import Task


def fit(
    task: Task,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    run: Run,
    tracker: Tracker,
    folder: Path,
    *,
    total_steps: int,
    clip_grad: float | None,
    reads_every_step: bool,
    ema: ModelEmaV3 | None = None,
    resume: Path | None = None,
    best: Best | None = None,
) -> bool:
    """Trains to `total_steps`, from a checkpoint if one is given.

    Args:
        task: what is learned, prepared by `deit_kd.training.setup`.
        accelerator: of this process.
        optimizer: prepared.
        schedule: step, from 0 -> learning rate.
        run: how often to log, evaluate and save.
        tracker: takes metrics.
        folder: of the run.
        total_steps: optimizer steps from the run's beginning.
        clip_grad: largest gradient norm; None for no limit.
        reads_every_step: see `StepGuard`.
        ema: of the student.
        resume: a checkpoint.
        best: keeps the weights of the best evaluation.

    Returns:
        True when the run is complete, False when a signal stopped it; its state is saved either way.

    Raises:
        UserError: the loss is not finite several times in a row, the disk is full, or the checkpoint does not fit.
    """
    state = RunState(
        module=accelerator.unwrap_model(task.module),
        optimizer=optimizer,
        ema=ema,
        tracker=tracker,
        accelerator=accelerator,
        folder=folder / "checkpoints",
        steps_per_epoch=task.steps_per_epoch,
        recipe=task.fingerprint,
        layout=task.layout,
        depends_on=task.depends_on,
        keep_checkpoints=run.keep_checkpoints,
        on_full_disk=run.on_full_disk,
        best=best,
    )
    step = state.restore(resume) if resume else 0
    save_every = task.steps_per_epoch if run.save_every_steps == "epoch" else run.save_every_steps
    eval_every = run.eval_every_epochs * task.steps_per_epoch
    tracker.start(step)
    if step == 0:
        tracker.log("projector", step, task.inspect())
    elif step % eval_every == 0 or step >= total_steps:  # a checkpoint is saved before its step is evaluated
        evaluated = [line for line in tracker.lines("eval") if line["step"] == step]
        _evaluate(task, tracker, step, ema, best, evaluated[-1] if evaluated else None)
    clock, window = Clock(accelerator.device), Window(step)
    guard = StepGuard(task, accelerator, optimizer, tracker, reads_every_step)
    stopped_early, batches = _stops_early(task, tracker, accelerator), None
    task.module.train()

    with Stop(alone=accelerator.num_processes == 1) as stop:
        try:
            while step < total_steps and not stopped_early and not guard.should_stop:
                epoch, step_of_epoch = divmod(step, task.steps_per_epoch)
                if batches is None or step_of_epoch == 0:
                    batches = task.train_batches(epoch, step_of_epoch, clock)
                lr = _set_learning_rate(optimizer, schedule(step))
                step += 1
                is_last_step = step == total_steps
                log, save, evaluate = step % run.log_every_steps == 0, step % save_every == 0, step % eval_every == 0
                guard.snapshot()
                terms = _backward(task, accelerator, batches, clock, log or is_last_step, stop, guard)
                guard.finish_backward(step, terms, wait=log or save or is_last_step or guard.should_stop)
                with clock.span("student"):
                    _update(task, accelerator, optimizer, clip_grad, ema, guard)
                state.reached = step
                tracker.advance()
                if log or is_last_step:
                    progress = {"epoch": step / task.steps_per_epoch, "lr": lr, **tracker.means()}
                    tracker.log("train", step, {**progress, **window.close(step, task.images_per_step, clock)})
                with window.paused():
                    if (save and guard.step_is_valid) or is_last_step or guard.should_stop:
                        state.save(step)  # before evaluating, which can take long and fail
                    if (evaluate or is_last_step) and not guard.should_stop:
                        with stop.interruptible():
                            _evaluate(task, tracker, step, ema, best)
                        stopped_early = _stops_early(task, tracker, accelerator)
            if guard.should_stop:
                tracker.say(stop_message(step, folder))
        except Stopped as stopped:  # in an evaluation, or in an unfinished step; such a step has changed buffers and nothing else
            guard.restore_buffers(torch.full_like(guard.found_inf, step > state.reached))
            guard.read_pending()
            state.save_if_newer()
            stopped.give_reason()
            tracker.say(stop_message(state.reached, folder))
            return False
    return stopped_early or step >= total_steps


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def _backward(
    task: Task,
    accelerator: Accelerator,
    batches: Iterator[Any],
    clock: Clock,
    detailed: bool,
    stop: Stop,
    guard: StepGuard,
) -> StepTerms:
    """The gradients of a step. All processes agree on isfinite(loss) before the last backward, which overlaps the reduction."""
    done: StepTerms = []
    for micro in range(1, task.accumulation_steps + 1):
        with stop.interruptible():
            batch, is_last_micro = next(batches), micro == task.accumulation_steps
        with nullcontext() if is_last_micro else accelerator.no_sync(task.module):
            terms = task.compute_terms(batch, clock, detailed)
            done.append((batch.indices, {name: value.detach().clone() for name, value in terms.items()}))
            if is_last_micro:
                guard.agree(stop, torch.stack([values["loss"] for _, values in done]).sum())
            with clock.span("student"):
                accelerator.backward(terms["loss"] / task.accumulation_steps)
    return done


def _update(
    task: Task,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    clip_grad: float | None,
    ema: ModelEmaV3 | None,
    guard: StepGuard,
) -> None:
    """The optimizer's step, unless the guard says that this one does not count."""
    if clip_grad is not None and guard.step_is_valid:
        accelerator.clip_grad_norm_(task.module.parameters(), clip_grad)
    guard.step()
    if ema is not None:
        ema.update(task.student)
    optimizer.zero_grad(set_to_none=True)


def _evaluate(
    task: Task, tracker: Tracker, step: int, ema: ModelEmaV3 | None, best: Best | None, done: dict[str, Any] | None = None
) -> None:
    """Evaluates, unless the metrics are `done`, and offers the weights to `best`."""
    metrics = done or task.evaluate(None if ema is None else ema.module)
    if best is not None:
        best.offer(step, metrics)
    if done is None:
        tracker.log("eval", step, {"epoch": step / task.steps_per_epoch, **metrics}, with_the_next=True)
        tracker.log("projector", step, task.inspect())
    task.module.train()


def _stops_early(task: Task, tracker: Tracker, accelerator: Accelerator) -> bool:
    """Whether to stop early. The main process decides, because only it has all lines."""
    answer = [accelerator.is_main_process and task.stop_early(tracker.lines("eval"))]
    broadcast_object_list(answer)
    return answer[0]
