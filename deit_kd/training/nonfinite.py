"""Steps whose loss is not finite: how processes agree that a step does not count, what is put back, and what is reported."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from deit_kd.errors import UserError
from deit_kd.training.metrics import Tracker
from deit_kd.training.signals import Stop
from deit_kd.training.task import Task

SKIPPED_IN_A_ROW = 3  # steps without a finite loss end the run
StepTerms = list[tuple[Tensor, dict[str, Tensor]]]  # of each micro-batch of a step its indices and its terms


class Vote:
    """What all processes must agree on before a step counts: is the loss finite everywhere, and is any of them asked to stop?

    The first answer stays on the device. The second is the host's; of several GPUs it comes with the step after, whose votes are
    copied long before anybody reads them.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.on_gpu = accelerator, accelerator.device.type == "cuda"
        self.skip = torch.zeros((), device=accelerator.device)  # 1: the loss of this step is not finite somewhere; else 0
        self.stopping = False
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def cast(self, stop: Stop, loss: Tensor) -> None:
        """This process's vote: its request to stop, and its loss, the sum of all micro-batches."""
        nonfinite = loss.isfinite().logical_not().float()
        if self.accelerator.num_processes == 1:
            self.skip, self.stopping = nonfinite, stop.requested
            return
        votes = torch.stack([nonfinite, torch.full_like(nonfinite, float(stop.requested))])
        votes = self.accelerator.reduce(votes, reduction="sum").clamp_max(1.0)
        self.skip = votes[0]
        if not self.on_gpu:
            self.stopping = bool(votes[1].item())
            return
        if self._copied:
            copy, event = self._copied
            event.synchronize()
            self.stopping = bool(copy.item())
        copy, event = torch.empty((), pin_memory=True).copy_(votes[1], non_blocking=True), torch.cuda.Event()
        event.record()
        self._copied = copy, event


class PendingSteps:
    """Steps of which the host does not know yet whether they count. Those that do enter the means; the others are reported."""

    def __init__(self, task: Task, tracker: Tracker):
        self.task, self.tracker, self.in_a_row = task, tracker, 0
        self.steps: list[tuple[int, StepTerms, Tensor]] = []  # number, terms, and 1 if it does not count

    def read(self) -> bool:
        """Waits for the device. Whether the last step counts; True if there is none.

        Raises:
            UserError: too many in a row do not.
        """
        skipped = torch.stack([skip for *_, skip in self.steps]).tolist() if self.steps else [False]
        for (step, done, _), skip in zip(self.steps, skipped, strict=False):
            self.in_a_row = self.in_a_row + 1 if skip else 0
            if skip:
                self._report(step, done)
            else:
                for _, values in done:
                    self.tracker.add(values)
        self.steps = []
        return not skipped[-1]

    def _report(self, step: int, done: StepTerms) -> None:
        """Reports which terms of which samples were not finite, and ends the run when that repeats."""
        mine = []
        for indices, values in done:
            terms = [name for name, value in values.items() if not value.isfinite()]
            if terms:  # `loss` is among them, and says nothing that its terms do not
                mine.append({"terms": terms, "samples": indices.tolist(), "names": self.task.sample_names(indices)})
        found = gather_object(mine)  # of all processes
        terms = list(dict.fromkeys(name for each in found for name in each["terms"] if name != "loss")) or ["loss"]
        names = [name for each in found for name in each["names"]]  # for people here; metrics.jsonl is published
        self.tracker.log("skipped", step, {"terms": terms, "samples": [index for each in found for index in each["samples"]]})
        fault = f"step {step}: {', '.join(terms)} not finite, for samples {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        if self.in_a_row < SKIPPED_IN_A_ROW:
            self.tracker.say(
                f"{fault} ({len(names)}; {self.tracker.file.name} has their places among the training images); the step is skipped"
            )
            return
        raise UserError(
            f"{fault}, {self.in_a_row} steps in a row; lower optim.lr, set optim.clip_grad, or use run.precision=no or teacher.precision=float32 if they were not; "
            "with another recipe give another --output or --resume none"
        )


class Buffers:
    """Buffers as they were before a step: what a step that does not count left in batch norms and memories must not stay."""

    def __init__(self, module: nn.Module):
        stored = module.state_dict()  # what is not is constant
        self.live = [buffer for name, buffer in module.named_buffers() if name in stored]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        """Copies them, before a step."""
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    def restore(self, skip: Tensor) -> None:
        """Puts them back where `skip` is 1, without asking the device."""
        for kept, live in zip(self.kept, self.live, strict=True):
            live.copy_(torch.where(skip.bool(), kept, live))


def can_skip_by_itself(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> bool:
    """Whether the optimizer reads on the device that a step does not count, as torch's fused ones do where no scaler uses that."""
    bare = getattr(optimizer, "optimizer", optimizer)
    return getattr(bare, "_step_supports_amp_scaling", False) and accelerator.scaler is None
