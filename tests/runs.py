"""A run of seconds on a few made pictures of cats and dogs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SETTINGS = [
    *("data.source=image_folder", "data.num_classes=auto", "epochs=1", "optim.warmup_epochs=0", "global_batch_size=4"),
    *("run.workers=0", "run.log_every_steps=1", "run.save_every_steps=2", "run.keep_checkpoints=1"),
    *("student.model_args.embed_dim=48", "student.model_args.depth=1"),
]


def make_data(root: Path, classes: tuple[str, ...] = ("cat", "dog"), train: int = 8, val: int = 4, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(root / split / name / f"{index:03d}.png")
    return root


def command(data: Path, output: Path, *more: object) -> list[str]:
    return [str(word) for word in ("--recipe", "quickstart_alone", "--data", data, "--output", output, *SETTINGS, *more)]
