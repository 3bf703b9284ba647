"""What several processes cost: images a second of one and two, the share of the gather, and a model of a step on many GPUs.

    python benchmarks/scaling.py

A DeiT-Ti with its projector to 3024 channels is trained on noise, in processes of one thread each, on the CPU. Every round times a step whose LogSum
sees the global batch against one whose LogSum sees the process's own, in turn. Writes results/scaling.json and prints the model's table, whose
assumptions are the constants below and are measured nowhere here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_kd import losses
from deit_kd import recipe as recipes
from deit_kd.distributed.global_batch import GlobalBatch
from deit_kd.losses.shares import by_shares
from deit_kd.models import Distiller, build_student
from deit_kd.models.build import make_plan
from deit_kd.models.projectors.vectors import build_projector
from deit_kd.training.run_folder import commit, hardware

WIDTH = 3024  # RegNetY-160's
LOCAL_BATCH = 128  # of the model below; images a GPU
STEP_SECONDS = (
    0.020  # student and teacher for LOCAL_BATCH images on one current datacenter GPU in bf16: an estimate, not a measurement
)
INSIDE, BETWEEN = 150e9, 25e9  # bytes a second of a GPU to others of its machine, and of other machines: 400 Gbit/s for two GPUs
IMAGE_BYTES = 110e3  # of a JPEG of ImageNet-1k


def worker(batch: int, rounds: int, file: str) -> None:
    """Times rounds of both kinds of step; process 0 writes their medians."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    recipe = recipes.load("deit_ti_plain")
    assert recipe.projector is not None
    distiller = Distiller(build_student(recipe.student, 1000, 224), [build_projector(recipe.projector, 192, WIDTH)], ["pooled"])
    optimizer = torch.optim.AdamW(distiller.parameters(), 1e-4)
    model, optimizer = accelerator.prepare(distiller, optimizer)
    images, teacher = torch.randn(batch, 3, 224, 224), torch.randn(batch, WIDTH)
    rows, steps = GlobalBatch(accelerator, 1), by_shares("logsum_correlation", {})
    assert steps is not None

    def step(whole: bool) -> float:
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        output = model(images, [teacher])
        pair = output.projected[0], teacher
        if whole:
            feature = rows.rescale_for_mean(steps.of_shares(rows.gather_rows("moments", steps.of_rows(*pair)[None])))
        else:
            feature = losses.logsum_correlation(*pair)
        accelerator.backward(feature + output.logits.mean() + output.dist_logits[0].mean())
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    pairs = [(step(True), step(False)) for _ in range(rounds + 1)][1:]
    if accelerator.is_main_process:
        ratios = sorted(a / b for a, b in pairs)
        told = {
            "processes": accelerator.num_processes,
            "images": batch * accelerator.num_processes,
            "seconds": median(a for a, _ in pairs),
            "global_to_device": median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        }
        Path(file).write_text(json.dumps(told))


def model() -> list[dict[str, Any]]:
    """Milliseconds of a step by part, were nothing hidden behind anything."""
    counted = make_plan(recipes.load("deit_ti"), 1000)
    rows = []
    for gpus in (8, 64, 512):
        speed = INSIDE if gpus <= 8 else BETWEEN
        others = (gpus - 1) / gpus
        gathered = others * gpus * (LOCAL_BATCH * counted.gathered_per_image + counted.gathered_per_share) * 4
        rows.append(
            {
                "gpus": gpus,
                "global_batch": gpus * LOCAL_BATCH,
                "compute_ms": 1000 * STEP_SECONDS,
                "all_reduce_bytes": round(2 * others * counted.gradient_bytes),
                "all_reduce_ms": 1000 * 2 * others * counted.gradient_bytes / speed,
                "gather_bytes": round(gathered),
                "gather_ms": 1000 * gathered / speed,
                "images_per_second": round(gpus * LOCAL_BATCH / STEP_SECONDS),
                "node_read_bytes_per_second": round(8 * LOCAL_BATCH / STEP_SECONDS * IMAGE_BYTES),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images of all processes together")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "scaling.json")
    options = parser.parse_args()
    measured = []
    for processes in (1, 2):
        print(f"{processes} process{'es' if processes > 1 else ''}: {options.rounds} rounds", flush=True)
        with tempfile.NamedTemporaryFile("r") as file:
            debug_launcher(worker, (options.batch // processes, options.rounds, file.name), num_processes=processes)
            measured.append(json.loads(Path(file.name).read_text()))
    print(f"\n{'processes':<11}{'images/s':>10}{'speed-up':>10}{'global/device':>15}")
    rates = [row["images"] / row["seconds"] for row in measured]
    for row, rate in zip(measured, rates, strict=True):
        print(f"{row['processes']:<11}{rate:>10.2f}{rate / rates[0]:>10.2f}{row['global_to_device']:>15.3f}")
    rows = model()
    print(f"\nModel, {LOCAL_BATCH} images a GPU; milliseconds a step, nothing hidden")
    print(f"{'GPUs':<8}{'compute':>9}{'all-reduce':>12}{'gather':>9}{'MB':>17}{'GB/s a node':>13}")
    for each in rows:
        megabytes = f"{each['all_reduce_bytes'] / 1e6:.0f} + {each['gather_bytes'] / 1e6:.0f}"
        print(
            f"{each['gpus']:<8}{each['compute_ms']:>9.1f}{each['all_reduce_ms']:>12.2f}{each['gather_ms']:>9.2f}{megabytes:>17}"
            f"{each['node_read_bytes_per_second'] / 1e9:>13.1f}"
        )
    content = {
        "command": f"python benchmarks/scaling.py --batch {options.batch} --rounds {options.rounds}",
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": commit(),
        "measured": measured,
        "model": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
