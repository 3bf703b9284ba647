"""What the second student costs: a training step with the teacher's forward, against one that reads a cache of its answers.

    python -m benchmarks.teacher_cache

DeiT-Ti (deit_ti_plain: 224 px, projector to 3024 channels, KL and LogSum) learns from a RegNetY-160 with random weights, 8 images a step, on
one thread of the CPU. A step is forward, terms, backward and AdamW on images that are ready; reading and decoding the cache is part of it,
making images is not. Rounds run every arm once in a random order; seconds are those of the process on the CPU. Before anything is timed
the terms of both must agree to the stored precision. Writes results/speed_teacher_cache.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import ImageNetInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paired import facts, paired_rounds, ratio
from deit_kd import recipe as recipes
from deit_kd.data.build import example_images
from deit_kd.data.sources.base import ArraySource
from deit_kd.models import CachedTeacher, build
from deit_kd.tasks.classification import Classification
from deit_kd.teacher_cache.write import write_cache
from deit_kd.training import acceleration
from deit_kd.training.metrics import Clock
from deit_kd.training.optim import build_optimizer

BATCH, STEPS = 8, 2
FORMATS = {"bf16 and full logits": ("bf16", "full"), "int8 and top-100": ("int8", "top:100")}
CPU = torch.device("cpu")
Sources = tuple[ArraySource, ArraySource]


def noise() -> Sources:
    """Two steps of images that nobody looks at, with ImageNet's classes."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH * STEPS, 224, 224, 3), dtype=np.uint8)
    source = ArraySource(images, np.arange(BATCH * STEPS), ImageNetInfo("imagenet-1k").label_names(), "noise", "noise")
    return source, source


def make_arm(
    cache: Path | None, sources: Sources, accelerator: Accelerator, folder: Path
) -> tuple[Callable[[], None], list[float]]:
    """A training step as a function, and the first step's kd and feature terms."""
    words = [f"global_batch_size={BATCH}", "epochs=1", "run.workers=0", "optim.warmup_epochs=0", "teacher.weights=random"]
    words += ["data.train_images=auto", f"teacher.cache={json.dumps(cache and str(cache))}"]
    recipe = recipes.load("deit_ti_plain", words)
    teachers = build.build_teachers(recipe, sources[0].class_names)
    accelerated = acceleration.prepare(
        recipe.run, teachers, partial(example_images, sources[0], recipe.data, recipe.evaluation), accelerator
    )
    if not FORMATS.keys() <= {path.name for path in folder.iterdir()}:
        teacher = teachers[0].live
        assert teacher
        for name, formats in FORMATS.items():
            write_cache(
                recipe, teacher, sources, folder / name, accelerator, views=1, formats=formats, ran=f"{accelerated.teachers[0]}"
            )
    task = Classification(recipe, accelerator, sources, teachers, folder, None, print)
    optimizer, clock = build_optimizer(recipe.optim, recipe.finetune, recipe.lr_factor(), task.module), Clock(CPU)
    batches, number = list(task.train_loader.epoch(0)), 0
    (asked,) = teachers

    def step() -> None:
        nonlocal number
        number = (number + 1) % STEPS
        batch = batches[number]
        if isinstance(asked, CachedTeacher):
            batch = replace(batch, cached_teacher=asked.read(0, number * BATCH, BATCH))
        terms = task.compute_terms(batch, clock, False)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.no_grad():
        terms = task.compute_terms(batches[0], clock, False)
    return step, [terms[name].item() for name in ("kd", "feature")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed_teacher_cache.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    accelerator, sources = Accelerator(cpu=True), noise()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        live, expected = make_arm(None, sources, accelerator, folder)
        arms = {"live": live}
        for name in FORMATS:
            arms[name], terms = make_arm(folder / name, sources, accelerator, folder)
            if not np.allclose(terms, expected, rtol=0.05):
                sys.exit(f"{name}: kd and feature are {terms}, with the live teacher {expected}: nothing is timed")
        times = paired_rounds(arms, options.rounds)
    print(f"\n{'teacher':<24}{'CPU s a step':>14}{'images/s':>10}{'live / it':>11}{'95 %':>16}")
    rows = []
    for name, seconds in times.items():
        middle, low, high = ratio(times["live"], seconds)
        rows.append({"teacher": name, "seconds": median(seconds), "ratio": middle, "interval": [low, high], "rounds": seconds})
        print(f"{name:<24}{median(seconds):>14.2f}{BATCH / median(seconds):>10.2f}{middle:>11.2f}{low:>9.2f}-{high:.2f}")
    content = {
        "command": f"python -m benchmarks.teacher_cache --rounds {options.rounds}",
        "what": "process CPU seconds of a training step of DeiT-Ti, 8 images of 224 px, one thread; ratio: live / this, median over paired rounds",
        "target": "at least 2.5",
        **facts(),
        "arms": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
