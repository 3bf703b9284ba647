"""What devices give: published peaks of GPUs, and a second's measurement of this machine's processor."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from deit_kd.errors import UserError
from deit_kd.recipe import nearest

MEMORY_THREADS = 8  # about as many fill a socket's memory channels; assumed


@dataclass(frozen=True)
class Device:
    """What one device gives to half precision (a CPU: to float32)."""

    name: str
    flops: float  # a second, matrix products
    bandwidth: float  # bytes a second of its memory
    memory: float  # bytes
    inside: float = 25e9  # bytes a second to the other devices of its machine, assumed
    between: float = 25e9  # bytes a second to other machines, assumed: 400 Gbit/s for two devices
    launch: float = 7e-6  # seconds that the host needs for one operation
    is_gpu: bool = True


# Peaks are dense bf16 with float32 accumulation, bandwidths and memory those of the vendor's data sheets: NVIDIA H200, H100 SXM, A100 80GB SXM, L40S;
# NVIDIA Ada (4090), Ampere GA102 (3090) and Blackwell (5090, RTX PRO 6000) architecture papers.
GPUS = {
    device.name: device
    for device in (
        Device("h200", 989e12, 4.8e12, 141e9, inside=150e9),
        Device("h100", 989e12, 3.35e12, 80e9, inside=150e9),
        Device("a100", 312e12, 2.039e12, 80e9, inside=100e9),
        Device("l40s", 362e12, 0.864e12, 48e9),
        Device("5090", 209.5e12, 1.792e12, 32e9),
        Device("4090", 165.2e12, 1.008e12, 24e9),
        Device("3090", 71e12, 0.936e12, 24e9),
    )
}


def find_device(name: str) -> Device:
    """A GPU of the table, or `cpu`: this machine's.

    Raises:
        UserError: a name that is not there.
    """
    if name == "cpu":
        return this_cpu()
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: not in the table{nearest(name.lower(), [*GPUS, 'cpu'])}; known are {', '.join(GPUS)}, cpu")
    return GPUS[name.lower()]


def device_here(kind: str) -> Device | None:
    """The `cpu`, or the `cuda` device of this machine if its name is in the table."""
    if kind == "cpu":
        return this_cpu()
    words, memory = re.findall(r"\w+", torch.cuda.get_device_name().lower()), torch.cuda.get_device_properties(0).total_memory
    return next((each for each in GPUS.values() if each.name in words and 0.8 < memory / each.memory < 1.2), None)


def this_cpu() -> Device:
    """This machine's processor with the threads that torch has, by a second of matrix products, copies and small operations on one thread.

    It is processor time that counts, so that what else the machine does is left out. Threads are taken to add up, in memory up to `MEMORY_THREADS`.
    """
    threads = torch.get_num_threads()
    a, b, out = (torch.randn(768, 768) for _ in range(3))
    source, target = torch.empty(32 << 20, dtype=torch.uint8), torch.empty(32 << 20, dtype=torch.uint8)
    x = torch.ones(8, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(50):
            y = y * x
        y.sum().backward()  # type: ignore[no-untyped-call]

    torch.set_num_threads(1)
    try:
        return Device(
            name="cpu",
            flops=threads * 2 * 768**3 / _median(lambda: torch.mm(a, b, out=out)),
            bandwidth=min(threads, MEMORY_THREADS) * 2 * source.numel() / _median(lambda: target.copy_(source)),
            memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
            launch=_median(chain) / 150,  # 50 forward, 100 backward
            is_gpu=False,
        )
    finally:
        torch.set_num_threads(threads)


def _median(function: Callable[[], object], seconds: float = 0.3) -> float:
    times: list[float] = []
    while sum(times) < seconds:
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return median(times)
