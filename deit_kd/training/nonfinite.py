"""What the processes of a run must agree on at each step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from deit_kd.training.signals import Stop


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
