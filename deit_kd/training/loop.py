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
from torch import Tensor

from deit_kd.training.best import Best
from deit_kd.training.metrics import Clock, Tracker, Window
from deit_kd.training.nonfinite import Buffers, PendingSteps, StepTerms, Vote, can_skip_by_itself
from deit_kd.training.signals import Stop, Stopped, goes_on
from deit_kd.training.state import RunState
from deit_kd.training.task import Loop, Task


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
    best: Best | None = None,
) -> bool:
    """Trains to `loop.total_steps`, from a checkpoint if one is given.

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
        keep_checkpoints=loop.keep_checkpoints,
        on_full_disk=loop.on_full_disk,
        best=best,
    )
    step = state.restore(resume) if resume else 0
    clock, batches, vote = Clock(accelerator.device), None, Vote(accelerator)
    tracker.start(step)
    if step == 0:
        tracker.log("projector", step, task.inspect())
    elif _evaluation_is_due(loop, task, step):  # stopped after saving, and before evaluating or after
        evaluated = [line for line in tracker.lines("eval") if line["step"] == step]
        _evaluate(task, tracker, step, ema, best, evaluated[-1] if evaluated else None)
    over = _is_over(task, tracker, accelerator)
    window, buffers, unread = Window(step), Buffers(task.module), PendingSteps(task, tracker)
    lazily = not loop.reads_every_step and can_skip_by_itself(optimizer, accelerator)
    task.module.train()

    with Stop(alone=accelerator.num_processes == 1) as stop:
        try:
            while step < loop.total_steps and not over:
                epoch, step_of_epoch = divmod(step, task.steps_per_epoch)
                if batches is None or step_of_epoch == 0:
                    batches = task.train_batches(epoch, step_of_epoch, clock)
                lr = schedule(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                step += 1
                log = step % loop.log_every_steps == 0 or step == loop.total_steps
                buffers.keep()
                done = _backward(task, accelerator, batches, loop.accumulation_steps, clock, log, stop, vote)
                unread.steps.append((step, done, vote.skip))
                due = step % loop.save_every_steps == 0 or step == loop.total_steps or vote.stopping
                counts = lazily or unread.read()
                with clock.span("student"):
                    if lazily or not counts:
                        buffers.restore(vote.skip)
                    _update(task, accelerator, optimizer, loop, ema, vote.skip if lazily else None, counts)
                    optimizer.zero_grad(set_to_none=True)
                state.reached = step
                tracker.advance()
                if lazily and (log or due):
                    counts = unread.read()

                if log:  # beside those that save, the only steps that wait for the device
                    means, speed = tracker.means(), window.close(step, loop.images_per_step, clock)
                    tracker.log("train", step, {"epoch": step / task.steps_per_epoch, "lr": lr, **means, **speed})
                with window.paused():
                    if due and (counts or vote.stopping or step == loop.total_steps):  # a skipped one could push out a good one
                        state.save(step)  # before evaluating, which can take long and fail
                    if _evaluation_is_due(loop, task, step) and not vote.stopping:
                        with stop.waiting():
                            _evaluate(task, tracker, step, ema, best)
                        over = _is_over(task, tracker, accelerator)
                if vote.stopping:
                    tracker.say(goes_on(step, folder))
                    break
        except Stopped as stopped:  # while it evaluated, or before the step was made, which changed buffers alone
            buffers.restore(torch.full_like(vote.skip, step > state.reached))
            unread.read()
            state.save_what_is_not()
            stopped.give_reason()
            tracker.say(goes_on(state.reached, folder))
            return False
    return over or step >= loop.total_steps


def _backward(
    task: Task,
    accelerator: Accelerator,
    batches: Iterator[Any],
    accumulation_steps: int,
    clock: Clock,
    detailed: bool,
    stop: Stop,
    vote: Vote,
) -> StepTerms:
    """The gradients of an optimizer step. All processes agree on isfinite(loss) before the last backward pass, which overlaps it."""
    done: StepTerms = []
    for micro in range(1, accumulation_steps + 1):
        with stop.waiting():
            batch, last = next(batches), micro == accumulation_steps
        with nullcontext() if last else accelerator.no_sync(task.module):
            terms = task.compute_terms(batch, clock, detailed)
            done.append((batch.indices, {name: value.detach().clone() for name, value in terms.items()}))
            if last:
                vote.cast(stop, torch.stack([values["loss"] for _, values in done]).sum())
            with clock.span("student"):
                accelerator.backward(terms["loss"] / accumulation_steps)
    return done


def _update(
    task: Task,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    loop: Loop,
    ema: ModelEmaV3 | None,
    skip: Tensor | None,
    counts: bool,
) -> None:
    """The optimizer's step, unless `skip` tells it on the device, or `counts` here, that this one does not count."""
    if loop.clip_grad is not None and counts:
        accelerator.clip_grad_norm_(task.module.parameters(), loop.clip_grad)
    if skip is not None:
        bare: Any = getattr(optimizer, "optimizer", optimizer)
        bare.found_inf = skip
        optimizer.step()
        del bare.found_inf
    elif counts:
        optimizer.step()
    if ema is not None:  # of a step that does not count: towards weights that stayed
        ema.update(task.student)


def _evaluation_is_due(loop: Loop, task: Task, step: int) -> bool:
    return step % (loop.eval_every_epochs * task.steps_per_epoch) == 0 or step >= loop.total_steps


def _evaluate(
    task: Task, tracker: Tracker, step: int, ema: ModelEmaV3 | None, best: Best | None, done: dict[str, Any] | None = None
) -> None:
    """Measures, unless that is `done`, and offers the weights to `best`."""
    metrics = done or task.evaluate(None if ema is None else ema.module)
    if best is not None:
        best.offer(step, metrics)
    if done is None:
        tracker.log("eval", step, {"epoch": step / task.steps_per_epoch, **metrics}, with_the_next=True)
        tracker.log("projector", step, task.inspect())
    task.module.train()


def _is_over(task: Task, tracker: Tracker, accelerator: Accelerator) -> bool:
    """Asks the task on the main process, which alone has all lines; all hear the answer."""
    answer = [accelerator.is_main_process and task.is_over(tracker.lines("eval"))]
    broadcast_object_list(answer)
    return answer[0]
