"""Interleaved timing: every round runs each arm once, in a random order, so that drifts of the machine hit all arms alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
from tqdm import tqdm


def paired_rounds(arms: dict[str, Callable[[], None]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """CPU seconds of this process, of each arm in each round; one round before the first warms up and is not counted."""
    rng, times = random.Random(seed), {name: list[float]() for name in arms}
    for counted in tqdm(range(rounds + 1), "rounds", delay=2, disable=None):
        for name in rng.sample(list(arms), len(arms)):
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
