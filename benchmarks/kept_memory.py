"""What it saves a training step on a CPU that freed memory is kept (`run.keep_memory`): ours, and timm's token distillation task.

    python -m benchmarks.kept_memory

DeiT-Ti with RegNetY-160, as in benchmarks/step.py, but each way in processes of its own, one after another, on one thread: what glibc does by
itself depends on how the heap of the process happens to lie. Median CPU seconds and page faults of steps, and the peak of the process. Linux
with glibc. Prints a table and writes results/speed_kept_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import TokenDistillationTask
from tqdm import tqdm

from benchmarks.paired import facts
from benchmarks.step import ours, theirs, work_of
from deit_kd.training.acceleration import keep_memory

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = "deit_tiny_distilled_patch16_224", "regnety_160"
WAYS = [(whose, kept) for whose in ("ours", "timm token") for kept in (True, False)]


def steps(whose: str, kept: bool, batch_size: int, counted: int) -> dict[str, Any]:
    """In this process: CPU seconds and page faults of each step after the second, bytes at the peak."""
    torch.set_num_threads(1)
    recipe, start, images, targets = work_of(*NETWORKS, batch_size, 224, torch.device("cpu"))
    if whose == "ours":
        recipe = replace(recipe, run=replace(recipe.run, keep_memory=kept))
        step = ours(recipe, Accelerator(cpu=True), start, images, targets).step
    else:
        if kept:
            keep_memory()
        step = theirs(TokenDistillationTask, start, NETWORKS, images, targets, compiled=False).step
    seconds, faults = [], []
    for number in range(counted + 2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        step()
        if number > 1:
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before[0])
            seconds.append(time.process_time() - before[1])
    return {"seconds": seconds, "page_faults": faults, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--steps", type=int, default=5, help="counted in each process")
    parser.add_argument("--processes", type=int, default=2, help="of each way")
    parser.add_argument("--one", help="a way as JSON, in this process")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed_kept_memory.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(steps(**json.loads(options.one))))
        return
    results: dict[str, Any] = {}
    todo = [(size, way) for size in options.batch_sizes for _ in range(options.processes) for way in WAYS]
    for size, (whose, kept) in tqdm(todo, "processes", disable=None):
        way = json.dumps({"whose": whose, "kept": kept, "batch_size": size, "counted": options.steps})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.kept_memory", "--one", way], cwd=ROOT, check=True, capture_output=True, text=True
        )
        name = f"{whose}, kept" if kept else whose
        results.setdefault(f"batch {size}", {}).setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    for size, ways in results.items():
        print(f"\n{size:<20}{'s a step':>10}{'page faults':>14}{'peak GB':>10}")
        for name, each in ways.items():
            all_of = {key: [value for process in each for value in process[key]] for key in ("seconds", "page_faults")}
            peak = max(process["peak_bytes"] for process in each)
            print(f"{name:<20}{median(all_of['seconds']):>10.3g}{median(all_of['page_faults']):>14,.0f}{peak / 1e9:>10.3g}")
    content = {"command": "python -m benchmarks.kept_memory " + " ".join(sys.argv[1:]), **facts(), "results": results}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
