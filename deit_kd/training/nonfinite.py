"""Steps whose loss is not finite: all processes agree on them, their changes are undone, and they are reported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.training.metrics import Tracker
from deit_kd.training.signals import Stop
from deit_kd.training.task import Task

SKIPPED_IN_A_ROW = 3  # steps without a finite loss end the run
StepTerms = list[tuple[Tensor, dict[str, Tensor]]]  # of each micro-batch of a step its indices and its terms


class _Buffers:
    """Buffers of one dtype and their values before a step, behind each other: three kernels however many they are."""

    def __init__(self, buffers: list[Tensor]):
        self.buffers = buffers
        self.before = torch.cat([each.detach().reshape(-1) for each in buffers])

    def keep(self) -> None:
        torch.cat([each.reshape(-1) for each in self.buffers], out=self.before)

    def put_back(self, where: Tensor) -> None:
        now = torch.cat([each.reshape(-1) for each in self.buffers])
        values = torch.where(where.bool(), self.before, now).split([each.numel() for each in self.buffers])
        torch._foreach_copy_(self.buffers, [value.view_as(each) for value, each in zip(values, self.buffers, strict=True)])


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        groups.setdefault(each.dtype, []).append(each)
    return list(groups.values())


class StepGuard:
    """Lets a step count only if the loss is finite on all processes.

    Torch's fused optimizers without a scaler read `found_inf` on the device. With them the host reads it on steps that are logged or
    saved, and waits for the device on no other. With all other optimizers the host reads it at each step.

    Args:
        task: names the samples of a bad step.
        accelerator: reduces over the processes.
        optimizer: of the run.
        tracker: gets the terms of steps that count, and a line for each other one.
        reads_every_step: the host reads the answer at each step anyway.

    Attributes:
        found_inf: 0-d, on the device: 1 if the loss of the step is not finite on some process, else 0.
        should_stop: a process was asked to stop. On several GPUs this comes a step later, so that the host need not wait for it.
        step_is_valid: False if the host knows that the step does not count.
    """

    def __init__(
        self, task: Task, accelerator: Accelerator, optimizer: torch.optim.Optimizer, tracker: Tracker, reads_every_step: bool
    ):
        self.task, self.accelerator, self.tracker, self.on_gpu = task, accelerator, tracker, accelerator.device.type == "cuda"
        self.optimizer = optimizer
        self.bare: Any = getattr(optimizer, "optimizer", optimizer)
        fused = getattr(self.bare, "_step_supports_amp_scaling", False)
        self.deferred = not reads_every_step and fused and accelerator.scaler is None
        self.found_inf = torch.zeros((), device=accelerator.device)
        self.should_stop, self.step_is_valid, self.invalid_in_a_row = False, True, 0
        self._pending: list[tuple[int, StepTerms, Tensor]] = []  # step, its terms, found_inf
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None
        stored = task.module.state_dict()  # non-persistent buffers never change
        self._buffers = [
            _Buffers(each) for each in _by_dtype(buffer for name, buffer in task.module.named_buffers() if name in stored)
        ]

    def snapshot(self) -> None:
        """Before a step: copies the buffers (of batch norms and memories), which the step changes."""
        for each in self._buffers:
            each.keep()

    def agree(self, stop: Stop, loss: Tensor) -> None:
        """Before the last backward pass of a step: sets `found_inf` and `should_stop` from the loss [] and the requests of all processes."""
        found_inf = loss.isfinite().logical_not().float()
        if self.accelerator.num_processes == 1:
            self.found_inf, self.should_stop = found_inf, stop.requested
            return
        both = torch.stack([found_inf, torch.full_like(found_inf, float(stop.requested))])
        both = self.accelerator.reduce(both, reduction="sum").clamp_max(1.0)
        self.found_inf = both[0]
        if not self.on_gpu:
            self.should_stop = bool(both[1].item())
            return
        if self._copied:
            copy, event = self._copied
            event.synchronize()
            self.should_stop = bool(copy.item())
        copy, event = torch.empty((), pin_memory=True).copy_(both[1], non_blocking=True), torch.cuda.Event()
        event.record()
        self._copied = copy, event

    def finish_backward(self, step: int, terms: StepTerms, wait: bool) -> None:
        """After backward: puts the buffers back if the step does not count, and reports it.

        Args:
            step: its number, from 1.
            terms: of its micro-batches.
            wait: for the device, to know now whether it counts.

        Raises:
            UserError: too many steps in a row do not count.
        """
        self.step_is_valid = True
        self._pending.append((step, terms, self.found_inf))
        if wait or not self.deferred:
            self.read_pending()
        if self.deferred or not self.step_is_valid:
            self.restore_buffers(self.found_inf)

    def step(self) -> None:
        """The optimizer's step, unless this one does not count."""
        if self.deferred:
            self.bare.found_inf = self.found_inf
            self.optimizer.step()
            del self.bare.found_inf
        elif self.step_is_valid:
            self.optimizer.step()

    def restore_buffers(self, where: Tensor) -> None:
        """Puts the buffers back if `where` [] is 1, without waiting for the device."""
        for each in self._buffers:
            each.put_back(where)

    def read_pending(self) -> None:
        """Waits for the device: adds the terms of steps that count to the means, and reports the others.

        Raises:
            UserError: too many steps in a row do not count.
        """
        if not self._pending:
            return
        for (step, terms, _), invalid in zip(self._pending, torch.stack([each[2] for each in self._pending]).tolist(), strict=True):
            self.step_is_valid = not invalid
            self.invalid_in_a_row = self.invalid_in_a_row + 1 if invalid else 0
            if invalid:
                self._report_nonfinite(step, terms)
            else:
                for _, values in terms:
                    self.tracker.add(values)
        self._pending = []

    def _report_nonfinite(self, step: int, done: StepTerms) -> None:
        """Reports which terms of which samples are not finite, and ends the run when that repeats."""
        mine: list[dict[str, Any]] = []
        for indices, values in done:
            terms = [name for name, value in values.items() if not value.isfinite()]
            if terms:
                mine.append({"terms": terms, "samples": indices.tolist(), "names": self.task.sample_names(indices)})
        found = gather_object(mine)
        terms = list(dict.fromkeys(name for each in found for name in each["terms"] if name != "loss")) or ["loss"]
        names = [name for each in found for name in each["names"]]  # printed, but not stored: metrics.jsonl is published
        self.tracker.log("skipped", step, {"terms": terms, "samples": [index for each in found for index in each["samples"]]})
        fault = f"step {step}: {', '.join(terms)} not finite, for samples {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        if self.invalid_in_a_row < SKIPPED_IN_A_ROW:
            self.tracker.say(
                f"{fault} ({len(names)}; {self.tracker.file.name} has their places among the training images); the step is skipped"
            )
            return
        raise UserError(
            f"{fault}, {self.invalid_in_a_row} steps in a row; lower optim.lr, set optim.clip_grad, or set run.precision=no and teacher.precision=float32; "
            "start the changed recipe with another --output or with --resume none"
        )
