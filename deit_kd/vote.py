"""What the processes of a run must agree on at each step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from deit_kd.stop import Stop


class Vote:
    """What all processes must agree on before a step counts: is the loss finite everywhere, and is any of them asked to stop?

    Votes are counted and copied while the backward pass runs, so that a GPU does not wait for the processor that waits for them.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.on_gpu = accelerator, accelerator.device.type == "cuda"

    def cast(self, stop: Stop, loss: Tensor) -> None:
        """This process's vote: its request to stop, and its loss, the sum of all micro-batches."""
        nonfinite = loss.isfinite().logical_not().float()
        votes = torch.stack([nonfinite, torch.full_like(nonfinite, float(stop.requested))])
        votes = self.accelerator.reduce(votes, reduction="sum")
        self._votes = torch.empty(2, pin_memory=True).copy_(votes, non_blocking=True) if self.on_gpu else votes
        if self.on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> tuple[bool, bool]:
        """(whether the step counts, whether to stop after it)"""
        if self.on_gpu:
            self._copied.synchronize()
        nonfinite, stop = self._votes.tolist()
        return not nonfinite, bool(stop)
