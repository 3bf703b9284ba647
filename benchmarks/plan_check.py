"""How far off is `deit-kd plan`? Its predictions for this machine's processor against steps that were measured.

    python benchmarks/plan_check.py                     # the results that are there, and steps of three recipes through the real loop
    python benchmarks/plan_check.py --runs runs/*       # and runs that are there

The processor is measured anew for each row. Rows of older results are wall seconds of other days, with what else the machine did then. GPUs: nothing in
results/ was measured on one yet; with --runs a run of a GPU in the table is checked too. Writes results/plan_check.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from deit_kd import recipe as recipes
from deit_kd.models.build import make_plan
from deit_kd.profiling import devices, roofline
from deit_kd.profiling.bench import StepBenchmark
from deit_kd.profiling.forecast import count_step, training_of
from deit_kd.recipe import Recipe
from deit_kd.training.metrics import read_metrics
from deit_kd.training.run_folder import commit, hardware

RESULTS = ROOT / "results"
# What is measured now: recipe, overrides. Fashion-MNIST is embedded; at 224 px it stands for images of that size.
AT_224 = ["data.source=fashion_mnist", "data.num_classes=auto", "global_batch_size=8", "teacher.weights=random", "run.workers=0"]
STEPS = {
    "quickstart": (["run.workers=0"], 30),
    "quickstart_alone": (["run.workers=0"], 30),
    "deit_ti_plain": (AT_224, 5),
    "deit_s_plain": (AT_224, 5),
}


def student_only(recipe: Recipe, batch: int, threads: int) -> float:
    """Predicted seconds of a step without a teacher on this processor."""
    torch.set_num_threads(threads)
    return predicted(recipe, batch, devices.this_cpu())["student"]


def predicted(recipe: Recipe, batch: int, device: devices.Device, gpus: int = 1, classes: int | None = None) -> dict[str, float]:
    """Predicted seconds of a step of `batch` images."""
    counted, work = make_plan(recipe, classes), count_step(recipe, classes, half=device.is_gpu)
    found = roofline.predict(
        training_of(recipe), counted, work, device, train_images=max(batch, recipe.global_batch_size), gpus=gpus
    )
    scale = batch / recipe.global_batch_size
    return {"teacher": found.teacher_seconds * scale, "student": found.student_seconds * scale, "whole": found.step_seconds * scale}


def row(what: str, part: str, measured: float, expected: float) -> dict[str, Any]:
    return {"what": what, "part": part, "measured_seconds": measured, "predicted_seconds": expected, "ratio": expected / measured}


def of_results() -> list[dict[str, Any]]:
    """results/*.json with seconds of steps: scaling.py and teacher_cache.py on one thread a process, objectives.py on all cores."""
    recipe, rows = recipes.load("deit_ti_plain", ["global_batch_size=32"]), []
    for each in json.loads((RESULTS / "scaling.json").read_text())["measured"]:
        share = each["images"] // each["processes"]
        what = f"scaling.json, DeiT-Ti, {each['images']} images on {each['processes']} processes"
        rows.append(row(what, "student", each["seconds"], student_only(recipe, share, 1)))
    torch.set_num_threads(1)
    eight = predicted(recipes.load("deit_ti_plain", ["global_batch_size=8"]), 8, devices.this_cpu())
    arms = {each["teacher"]: each["seconds"] for each in json.loads((RESULTS / "speed_teacher_cache.json").read_text())["arms"]}
    rows.append(row("speed_teacher_cache.json, DeiT-Ti, 8 images, live teacher", "whole", arms["live"], eight["whole"]))
    name = "speed_teacher_cache.json, DeiT-Ti, 8 images, cached teacher"
    rows.append(row(name, "student", arms["bf16 and full logits"], eight["student"]))
    conv_stem = recipes.load("deit_ti", ["global_batch_size=32"])
    found = json.loads((RESULTS / "objectives.json").read_text())["results"][
        "DeiT-Ti step, batch 32: orthonormal / linear projector"
    ]
    rows.append(
        row(
            "objectives.json, DeiT-Ti with conv stem, 32 images",
            "student",
            found["other_ms"] / 1000,
            student_only(conv_stem, 32, 2),
        )
    )
    return rows


def of_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """Runs that train.py made here, by their median rate."""
    rows = []
    for folder in folders:
        lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
        if not lines or not (folder / "run.json").exists():
            continue
        run, recipe = json.loads((folder / "run.json").read_text()), recipes.load(folder / "recipe.yaml")
        name = run["hardware"].lower()
        device = devices.this_cpu() if "cpu" in name else next((gpu for gpu in devices.GPUS.values() if gpu.name in name), None)
        if device is None:
            continue
        batch = run["global_batch_size"]
        expected = predicted(recipe, batch, device, run["processes"], run["data"]["num_classes"])["whole"]
        rows.append(row(folder.name, "whole", batch / median(line["images_per_second"] for line in lines), expected))
    return rows


def of_steps() -> list[dict[str, Any]]:
    """Steps through the real loop, on one thread, the same batch again and again; processor seconds, which other work does not lengthen."""
    torch.set_num_threads(1)
    rows = []
    for name, (overrides, steps) in tqdm(STEPS.items(), unit="recipe"):
        recipe = recipes.load(name, overrides)
        benchmark = StepBenchmark(recipe, None, "cpu")
        found = benchmark.time(steps, same_batch=True)
        expected = predicted(recipe, recipe.global_batch_size, devices.this_cpu(), classes=10)
        AcceleratorState._reset_state(reset_partial_state=True)
        rows.append(row(f"{name}, {recipe.global_batch_size} images, now", "whole", found["processor"], expected["whole"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of runs that this machine made")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_check.json")
    options = parser.parse_args()
    rows = of_steps() + of_results() + of_runs(options.runs)
    print(f"{'':<58}{'part':<10}{'measured s':>12}{'predicted':>11}{'ratio':>8}")
    for each in rows:
        print(
            f"{each['what']:<58}{each['part']:<10}{each['measured_seconds']:>12.4g}{each['predicted_seconds']:>11.4g}{each['ratio']:>8.2f}"
        )
    errors = sorted(abs(math.log(each["ratio"])) for each in rows)
    typical, worst = (math.exp(value) for value in (median(errors), errors[-1]))
    print(f"typically off by a factor of {typical:.2f}, at worst by {worst:.2f}")
    content = {
        "command": " ".join(["python", "benchmarks/plan_check.py", *sys.argv[1:]]),
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": commit(),
        "rows": rows,
        "typical_factor": typical,
        "worst_factor": worst,
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
