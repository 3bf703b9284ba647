"""Peak memory of a training step against its batch: the teacher first, as here, or the student first; and what `deit-kd plan` says.

    python benchmarks/memory.py                      # on a GPU if there is one
    python benchmarks/memory.py --quick              # DeiT-Ti on a CPU, two batches

Each number is of a fresh process: on a GPU the most that torch had allocated, on a CPU the most that the process held (Linux), with
MALLOC_MMAP_THRESHOLD_ set so that freed tensors go back at once. What a step takes an image is the slope between the smallest and the largest batch.
Random weights: memory does not depend on them. Writes results/speed_memory.json. Its GPU branch was not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.models import build
from deit_kd.profiling import roofline
from deit_kd.profiling.forecast import count_step, training_of
from deit_kd.training import optim
from deit_kd.training.run_folder import commit, hardware

ORDERS = ("teacher first", "student first")


def step(name: str, batch: int, order: str, device: torch.device) -> float:
    """Bytes at the peak of two steps (the first makes the optimizer's moments)."""
    recipe = recipes.load(name, ["teacher.weights=random"])
    (teacher,) = build.build_teachers(recipe, 1000)
    distiller = build.build_distiller(recipe, 1000, [teacher]).to(device).train()
    teacher, optimizer = teacher.to(device), optim.build_optimizer(recipe.optim, recipe.finetune, recipe.lr_factor(), distiller)
    images = torch.randn(batch, 3, recipe.data.img_size, recipe.data.img_size, device=device)
    placeholder = torch.empty(batch, teacher.width, device=device)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if order == "teacher first":
                taught = teacher(images)
                output = distiller(images, [taught.tapped["pooled"]])
            else:
                output = distiller(images, [placeholder])
                taught = teacher(images)
        loss = losses.kl_distillation(output.dist_logits[0], taught.logits) + output.logits.float().logsumexp(1).mean()
        loss = loss + losses.logsum_correlation(output.projected[0], taught.tapped["pooled"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del output, taught, loss
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def in_a_process(name: str, batch: int, order: str, device: str) -> float:
    """`step` in a process of its own; nan when it does not fit."""
    command = [sys.executable, __file__, "--one", name, str(batch), order, device]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and "OutOfMemory" in done.stderr:
        return float("nan")
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def measure(name: str, batches: list[int], device: str) -> dict[str, Any]:
    """Peaks of both orders at each batch, bytes an image, and the plan's."""
    recipe = recipes.load(name)
    counted, work = build.make_plan(recipe, None), count_step(recipe, None, half=device == "cuda")
    rows = [
        {
            "batch": batch,
            **{order: in_a_process(name, batch, order, device) for order in ORDERS},
            "predicted": roofline.memory_bytes(training_of(recipe), counted, work, batch),
        }
        for batch in tqdm(batches, desc=name, unit="batch")
    ]
    fitted = [row for row in rows if all(row[order] == row[order] for order in ORDERS)]
    span = fitted[-1]["batch"] - fitted[0]["batch"]
    slopes = {key: (fitted[-1][key] - fitted[0][key]) / span for key in (*ORDERS, "predicted")}
    return {"rows": rows, "bytes_per_image": slopes, "saved_bytes_per_image": work.saved_bytes_per_image}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["deit_ti_plain", "deit_s_plain"])
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="DeiT-Ti, two batches, on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed_memory.json")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, batch, order, device = options.one
        print(step(name, int(batch), order, torch.device(device)))
        return
    device = "cuda" if torch.cuda.is_available() and not options.quick else "cpu"
    batches = options.batches or ([4, 12] if options.quick else [64, 256, 1024] if device == "cuda" else [4, 8, 16, 32])
    names = ["deit_ti_plain"] if options.quick else options.recipes
    results = {name: measure(name, sorted(batches), device) for name in names}
    for name, found in results.items():
        print(f"\n{name:<16}{'teacher first':>15}{'student first':>15}{'predicted':>12}   MB at the peak")
        for row in found["rows"]:
            print(f"{row['batch']:<16}{row[ORDERS[0]] / 1e6:>15.0f}{row[ORDERS[1]] / 1e6:>15.0f}{row['predicted'] / 1e6:>12.0f}")
        slopes = found["bytes_per_image"]
        print(
            f"{'an image':<16}"
            + f"{slopes[ORDERS[0]] / 1e6:>15.1f}{slopes[ORDERS[1]] / 1e6:>15.1f}{slopes['predicted'] / 1e6:>12.1f}"
        )
    content = {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "measure": "bytes: most allocated by torch" if device == "cuda" else "bytes: most resident, the interpreter's included",
        "hardware": hardware(torch.device(device)),
        "torch": torch.__version__,
        "commit": commit(),
        "results": results,
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
