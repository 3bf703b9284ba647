"""Signals that ask a run to stop, and what its processes must agree on at each step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor


class Stop:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop meets after the step; a second signal ends the process at once.

    Signals of the same second are one request: a scheduler and the launcher that it signalled too often both send one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> Stop:
        self.requested, self._since = False, 0.0
        self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


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
