"""Interleaved timing: every round runs each arm once, in a random order, so that drifts of the machine hit all arms alike."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deit_kd.training.run_folder import commit, hardware


def paired_rounds(
    arms: dict[str, Callable[[], Any]], rounds: int, seed: int = 0, before: Callable[[str], object] = lambda _: None
) -> dict[str, list[float]]:
    """CPU seconds of this process, of each arm in each round; one round before the first warms up and is not counted.

    `before` gets the arm's name ahead of each of its calls, and is not counted either.
    """
    rng, times = random.Random(seed), {name: list[float]() for name in arms}
    for counted in tqdm(range(rounds + 1), "rounds", delay=2, disable=None):
        for name in rng.sample(list(arms), len(arms)):
            before(name)
            started = time.process_time()
            arms[name]()
            if counted:
                times[name].append(time.process_time() - started)
    return times


def ratio(times_a: Sequence[float], times_b: Sequence[float]) -> tuple[float, float, float]:
    """The median over rounds of a / b, with its bootstrapped 95 % interval: above 1, b is the faster."""
    ratios = np.asarray(times_a) / np.asarray(times_b)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(median(ratios)), float(low), float(high)


def cuda_rounds(arms: dict[str, Callable[[], Any]], rounds: int, steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds a call of each arm in each round of `steps` calls, by events at the ends of the round; 30 calls warm up."""
    rng, times = random.Random(seed), {name: list[float]() for name in arms}
    for arm in arms.values():
        for _ in range(30):
            arm()
    for _ in tqdm(range(rounds), "rounds", delay=2, disable=None):
        for name in rng.sample(list(arms), len(arms)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                arms[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1000 / steps)
    return times


def facts() -> dict[str, Any]:
    """What a number depends on beside the code: machine, versions, how busy it was."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "hardware": hardware(device),
        "processor": next(
            (line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")), platform.processor()
        ),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
        "commit": commit(),
    }
