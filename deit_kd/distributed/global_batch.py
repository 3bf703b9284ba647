"""The whole global batch, for losses that couple its samples: rows that other processes and other micro-batches hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


class GlobalBatch:
    """Joins the micro-batches of an optimizer step, so that a loss does not depend on how the global batch is cut.

    Every process computes a loss of all rows, its own with their graph, all others as constants: summed over processes and
    micro-batches its gradients are those of the loss. No gradient is communicated here.

    With one micro-batch a process, rows are gathered where they are needed. With several, a first pass without gradients
    (`recording`) keeps the rows of each, and a second uses them.

    Args:
        accelerator: gathers over processes.
        micro_steps: micro-batches of a process in an optimizer step.
    """

    def __init__(self, accelerator: Accelerator, micro_steps: int):
        self.accelerator, self.micro_steps = accelerator, micro_steps
        self.is_recording = False
        self._micro = 0
        self._kept: dict[str, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What `gather_rows` gets inside, one micro-batch after the other, is kept for the pass that follows."""
        self._kept, self.is_recording = {}, True
        try:
            yield
        finally:
            self.is_recording, self._micro = False, 0

    @property
    def is_last(self) -> bool:
        """Whether the step ends with this micro-batch."""
        return self._micro == self.micro_steps - 1

    def advance(self) -> None:
        """The next micro-batch begins."""
        self._micro = (self._micro + 1) % self.micro_steps

    def gather_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows [b,...] of this micro-batch -> [B,...] of the global batch, in its order, with gradients to the given rows.

        Args:
            name: tells the tensors of a step apart.
            rows: as many on every process and in every micro-batch.
        """
        if self.is_recording:
            self._kept.setdefault(name, []).append(self._gather(rows))
            return rows
        if self.accelerator.num_processes * self.micro_steps == 1:
            return rows
        parts = [self._gather(rows)] if self.micro_steps == 1 else list(self._kept[name])
        theirs, first = parts[self._micro], self.accelerator.process_index * len(rows)
        parts[self._micro] = torch.cat([theirs[:first], rows, theirs[first + len(rows) :]])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rescale_for_mean(self, loss: Tensor) -> Tensor:
        """A loss of complete rows, whose gradient survives the mean over processes and micro-batches that training takes."""
        cuts = self.accelerator.num_processes * self.micro_steps
        return loss if cuts == 1 else loss + (cuts - 1) * (loss - loss.detach())

    def _gather(self, rows: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(rows.detach())
        return gathered if self.accelerator.num_processes > 1 else gathered.clone()  # a CUDA graph writes over its own outputs
