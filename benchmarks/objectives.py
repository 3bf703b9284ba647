"""What two objectives cost: norm_direction against a loop over the batch, the orthonormal projector against a linear one.

    python benchmarks/objectives.py

Each comparison alternates its two sides and takes the median of paired ratios. Writes results/objectives.json. On a GPU it measures there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.models import build, build_student
from deit_kd.models.projectors.vectors import Orthonormal
from deit_kd.training.run_folder import commit, hardware

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Medians of both and of the ratio of each pair; the first pair warms up."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    return {
        "ours_ms": 1000 * median(a for a, _ in pairs),
        "other_ms": 1000 * median(b for _, b in pairs),
        "ratio": median(a / b for a, b in pairs),
    }


def direction(batch: int, width: int, rounds: int) -> dict[str, float]:
    """Forward and backward, against a loop as the release has it: class means as lists of a JSON file, one sample at a time."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, width, generator=generator).to(DEVICE) for _ in range(2))
    table = torch.randn(1000, width, generator=generator)
    labels = torch.randint(1000, (batch,), generator=generator)
    lists, means, on_device = table.tolist(), table.to(DEVICE), labels.to(DEVICE)
    student.requires_grad_()

    def vectorized() -> None:
        losses.norm_direction(student, teacher, means[on_device]).backward()
        student.grad = None

    def loop() -> None:
        total = torch.zeros((), device=DEVICE)
        for ours, theirs, label in zip(student, teacher, labels, strict=True):
            mean = torch.tensor(lists[int(label)]).to(DEVICE)
            total = total + 1 - ours @ (mean / mean.norm()) / torch.max(ours.norm(), theirs.norm())
        (total / batch).backward()
        student.grad = None

    return compare(vectorized, loop, rounds)


def orthonormal(batch: int, rounds: int) -> dict[str, float]:
    """The projector's forward and backward alone, and the step of the DeiT-Ti student with either projector (no teacher)."""
    recipe = recipes.load("deit_ti", ["teacher.weights=random", "teacher.name=regnety_160"])
    with torch.device("meta"):
        teachers = build.build_teachers(recipe, 1000)
        widths = 192, teachers[0].width
    student = build_student(recipe.student, 1000, 224).to(DEVICE)
    images, features = torch.randn(batch, 3, 224, 224, device=DEVICE), torch.randn(batch, widths[1], device=DEVICE)

    def step(projector: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()], 1e-4)

        def run() -> None:
            tokens = student.forward_features(images)
            logits = student.forward_head(tokens)
            loss: Tensor = losses.layer_norm_smooth_l1(projector(tokens[:, 2:].mean(1)), features) + logits.logsumexp(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def alone(projector: nn.Module) -> Callable[[], None]:
        inputs = torch.randn(batch, widths[0], device=DEVICE)
        return lambda: projector(inputs).sum().backward()

    ours, linear = Orthonormal(*widths).to(DEVICE), nn.Linear(*widths, bias=False).to(DEVICE)
    extra = compare(alone(ours), alone(linear), 4 * rounds)
    whole = compare(step(ours), step(linear), rounds)
    share = (extra["ours_ms"] - extra["other_ms"]) / whole["other_ms"]
    return {**whole, "projector_ms": extra["ours_ms"], "linear_ms": extra["other_ms"], "extra_share_of_step": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=32 if DEVICE.type == "cpu" else 256, help="of the training step")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "objectives.json")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for width in (64, 256, 2048, 3024):
        results[f"norm_direction, batch 1024, width {width}: vectorized / loop"] = direction(1024, width, options.rounds)
    results[f"DeiT-Ti step, batch {options.batch}: orthonormal / linear projector"] = orthonormal(options.batch, options.rounds)
    for name, values in results.items():
        print(f"{name:<66}" + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    facts = {
        "command": "python benchmarks/objectives.py",
        "hardware": hardware(DEVICE),
        "torch": torch.__version__,
        "commit": commit(),
    }
    options.output.write_text(json.dumps({**facts, "rounds": options.rounds, "results": results}, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
