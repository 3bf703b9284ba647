"""Where a step's time goes on a device: kernels, waits and gaps, by torch.profiler, with a picture of the timeline.

    python -m benchmarks.profile_step --device cuda --batch-size 256
    python -m benchmarks.profile_step --quick

The real loop of a recipe on real photos, with steps that are not logged. MFU is the operations that the networks need, over the step's
time, over what a bfloat16 matrix product reaches on this device in the same process (float32 on a CPU). Writes FOLDER/profile.json, profile.png
and trace.json, which chrome://tracing and Perfetto open.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.loader import fill
from benchmarks.paired import facts
from deit_kd import recipe as recipes
from deit_kd.models import Teacher
from deit_kd.models.build import make_plan
from deit_kd.profiling.bench import StepBenchmark
from deit_kd.training import loop

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
PHASES = (
    "backward and the rest",
    "student and losses",
    "teacher",
    "augmentation",
    "optimizer",
)  # a phase before those inside of it


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*arguments, **kwargs)

    return call


def matrix_product_rate(device: torch.device) -> float:
    """Operations a second of a large matrix product, the best of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def summarize(events: list[Any], steps: int, on_gpu: bool) -> dict[str, Any]:
    """Of the profiled steps: the share of time in which the device works, and what it does."""
    ours = [each for each in events if (each.device_type == DeviceType.CUDA) == on_gpu and each.name not in PHASES]
    kernels = [each for each in ours if not each.name.startswith("ProfilerStep")]
    if not on_gpu:
        kernels = [
            each for each in kernels if each.name.startswith("aten::") and each.cpu_parent and each.cpu_parent.name in PHASES
        ]
    spans = sorted((each.time_range.start, each.time_range.end) for each in kernels)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    total = (spans[-1][1] - spans[0][0]) if spans else 1.0
    by_name: Counter[str] = Counter()
    for each in kernels:
        by_name[each.name] += each.time_range.elapsed_us()
    waits = [each for each in events if each.name in WAITS or (on_gpu and each.name.startswith("Memcpy DtoH"))]
    return {
        "kernels_a_step": len(kernels) / steps,
        "busy": busy / total,
        "waits_a_step": dict(Counter(each.name for each in waits).items()),
        "longest": [[name[:120], microseconds / steps] for name, microseconds in by_name.most_common(20)],
        "phases_us_a_step": {
            name: sum(each.time_range.elapsed_us() for each in events if each.name == name and each.device_type == DeviceType.CPU)
            / steps
            for name in PHASES
        },
    }


def draw(events: list[Any], on_gpu: bool, file: Path) -> None:
    """A row for the host's phases, one for the device's kernels."""
    start = min(each.time_range.start for each in events if each.name in PHASES)
    figure, axes = plt.subplots(figsize=(14, 3.2), layout="constrained")
    colors = dict(zip(PHASES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for name in PHASES:
        bars = [each for each in events if each.name == name and each.device_type == DeviceType.CPU]
        spans = [((each.time_range.start - start) / 1e3, each.time_range.elapsed_us() / 1e3) for each in bars]
        axes.broken_barh(spans, (1.1, 0.8), color=colors[name], label=name)
    kernels = [each for each in events if each.device_type == DeviceType.CUDA and each.name not in PHASES] if on_gpu else []
    axes.broken_barh(
        [((each.time_range.start - start) / 1e3, each.time_range.elapsed_us() / 1e3) for each in kernels], (0.1, 0.8), color="0.25"
    )
    axes.set_yticks([0.5, 1.5], ["device", "host"])
    axes.set_ylim(0, 2)
    axes.set_xlabel("milliseconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=5, frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--recipe", default="deit_ti")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--quick", action="store_true", help="small networks and batch")
    parser.add_argument("--output", type=Path, default=Path("profile"))
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    small = (
        ["teacher.name=regnety_002", "student.model_args={embed_dim: 48, depth: 2}", "global_batch_size=8"] if options.quick else []
    )
    overrides = [
        *("data.source=image_folder", "data.num_classes=auto", "data.train_images=auto", "teacher.weights=random"),
        *(
            f"global_batch_size={options.batch_size}",
            "run.log_every_steps=100000",
            f"run.compile={'false' if options.eager else 'auto'}",
        ),
        *small,
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as photos:
        batch = 8 if options.quick else options.batch_size
        fill(Path(photos), 2 * batch)
        recipe = recipes.load(options.recipe, overrides)
        benchmark = StepBenchmark(recipe, Path(photos), options.device)
        task, loader = benchmark.task, benchmark.loader
        Teacher.forward = named("teacher", Teacher.forward)  # type: ignore[method-assign]
        loader._finished = named("augmentation", loader._finished)  # type: ignore[method-assign]
        task.compute_terms = named("student and losses", task.compute_terms)  # type: ignore[method-assign]
        loop._update = named("optimizer", loop._update)  # type: ignore[assignment]
        loop._backward = named("backward and the rest", loop._backward)  # type: ignore[assignment]
        warm_up = benchmark.time(2 if options.quick else 10)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiled:
            benchmark.time(options.steps)
            wait(benchmark.accelerator.device)
        plan = make_plan(recipe, task.num_classes)
        rate = matrix_product_rate(benchmark.accelerator.device)
        steps = options.steps + max(1, options.steps // 5)
        events = list(profiled.events() or [])
        needed = plan.training_gflop_per_image * 1e9 * batch
        result = {
            **facts(),
            "recipe": options.recipe,
            "batch_size": batch,
            "seconds_a_step": warm_up["whole"],
            "matrix_product_tflops": rate / 1e12,
            "mfu": needed / warm_up["whole"] / rate,
            **summarize(events, steps, on_gpu),
        }
    profiled.export_chrome_trace(str(options.output / "trace.json"))
    (options.output / "profile.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(events, on_gpu, options.output / "profile.png")
    print(
        f"{result['seconds_a_step'] * 1e3:.1f} ms a step, busy {result['busy']:.0%}, MFU {result['mfu']:.1%}; {options.output}/profile.json, profile.png"
    )


if __name__ == "__main__":
    main()
