"""What a training step costs: ours, eager and compiled, beside timm's distillation tasks and DeiT's loss, on the same work.

    python -m benchmarks.step --quick
    python -m benchmarks.step --student deit_small_distilled_patch16_224
    python -m benchmarks.step --device cuda --batch-sizes 64 256 1024

One process, the same teacher weights, student weights, batch and soft labels, AdamW, gradients clipped at 15. Each arm does its own whole
step. On a CPU one thread and the process's CPU time; on a GPU bfloat16 autocast and events. On a CPU freed memory is kept for our arms, as
our runs do, and for one more of timm's; the others have glibc's usual thresholds at their most generous. Each counted step follows one that is
not, after the heap was given back, and its page faults are counted. Rounds run the arms in random order; ratios are
medians over rounds with bootstrapped 95 % intervals; timm's token task runs twice, and the two must agree. The teacher's weights are random:
its time does not depend on them. Before anything is timed, loss, gradients and teacher features of each of our arms are compared with a
plain float32 eager step, and a difference ends the benchmark. Prints a table and writes results/speed_step_DEVICE.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask, TokenDistillationTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from benchmarks.paired import cuda_rounds, facts, paired_rounds, ratio
from deit_kd import recipe as recipes
from deit_kd.data import Batch
from deit_kd.data.sources.base import ArraySource
from deit_kd.models import build
from deit_kd.profiling.devices import Device
from deit_kd.profiling.forecast import count_step
from deit_kd.profiling.roofline import seconds_of
from deit_kd.tasks.classification import Classification
from deit_kd.training import acceleration, optim
from deit_kd.training.loop import _backward, _update
from deit_kd.training.metrics import Clock, Tracker
from deit_kd.training.nonfinite import StepGuard
from deit_kd.training.signals import Stop

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"float32": (1e-5, 1e-4, 1e-4), "bfloat16": (2e-2, 3e-2, 3e-1)}  # loss, gradient, teacher features; relative
BASE = "timm token"
CLASSES = 1000
KEPT = "memory kept"

Step = tuple[Tensor, dict[str, Tensor], Tensor]  # loss, gradients by name, teacher features


@dataclass
class Arm:
    """A way to do a step."""

    step: Callable[[], Tensor]  # gives the loss
    student: nn.Module
    teacher: nn.Module
    teacher_features: Callable[[Tensor], Tensor]


def ours(recipe: recipes.Recipe, accelerator: Accelerator, start: dict[str, Tensor], images: Tensor, targets: Tensor) -> Arm:
    """The step of `deit_kd.training.loop`, on one batch again and again."""
    source = ArraySource(
        np.zeros((len(images), 8, 8, 3), np.uint8), np.zeros(len(images), int), [str(n) for n in range(CLASSES)], "", ""
    )
    teachers: list[Any] = [teacher.to(accelerator.device) for teacher in build.build_teachers(recipe, CLASSES)]
    teachers[0].model.load_state_dict(
        {name.removeprefix("teacher."): value for name, value in start.items() if name.startswith("teacher.")}
    )
    accelerated = acceleration.prepare(recipe.run, teachers, lambda: images[:4], accelerator)
    with tempfile.TemporaryDirectory() as folder:
        task = Classification(recipe, accelerator, (source, source), teachers, Path(folder), None, print, accelerated.compiled)
    task.student.load_state_dict(
        {name.removeprefix("student."): value for name, value in start.items() if name.startswith("student.")}
    )
    task.module.to(accelerator.device)
    task.module, optimizer = accelerator.prepare(
        task.module, optim.build_optimizer(recipe.optim, recipe.finetune, recipe.lr_factor(), task.module)
    )
    task.module.train()
    batch = Batch(images, targets, targets.argmax(1), torch.arange(len(images), device=images.device), 0, 0)
    clock, stop, tracker = Clock(accelerator.device), Stop(), Tracker(accelerator, Path(folder), 1)
    guard = StepGuard(task, accelerator, optimizer, tracker, reads_every_step=False)

    def step() -> Tensor:
        done = _backward(task, accelerator, iter([batch]), clock, False, stop, guard)
        _update(task, accelerator, optimizer, recipe.optim.clip_grad, None, guard)
        clock._spans.clear()
        return done[0][1]["loss"]

    return Arm(step, task.student, teachers[0], lambda x: teachers[0](x).features)


def theirs(
    make: Callable[..., Any], start: dict[str, Tensor], names: tuple[str, str], images: Tensor, targets: Tensor, compiled: bool
) -> Arm:
    """The step of timm's training script: soft labels, distillation, AdamW of its factory, clipping, and the loss read at each step."""
    device = images.device
    student = timm.create_model(names[0], num_classes=CLASSES)
    teacher = timm.create_model(names[1], num_classes=CLASSES).eval()
    for model, prefix in ((student, "student."), (teacher, "teacher.")):
        model.load_state_dict({name.removeprefix(prefix): value for name, value in start.items() if name.startswith(prefix)})
    if device.type == "cuda":
        student.to(memory_format=torch.channels_last)  # as its train.py with --channels-last
    task = make(student.to(device), teacher.to(device), criterion=SoftTargetCrossEntropy(), device=device, verbose=False)
    task.to(device).train()
    if compiled:
        task.compile()
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-5, weight_decay=0.05)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step() -> Tensor:
        with autocast:
            loss: Tensor = task(images, targets)["loss"]
        loss.backward()
        dispatch_clip_grad(student.parameters(), 15.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return loss

    return Arm(step, student, teacher, lambda x: teacher.forward_head(teacher.forward_features(x), pre_logits=True))


class DeitTask(nn.Module):
    """What a step of DeiT's own code computes (Touvron et al., 2021): soft distillation at temperature 1, loss read before backward."""

    def __init__(self, student: Any, teacher: nn.Module, criterion: nn.Module, device: torch.device, verbose: bool):
        super().__init__()
        student.set_distilled_training(True)
        self.student, self.teacher, self.criterion = student, teacher, criterion

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Loss by images [B,3,H,W] and targets [B,K]."""
        logits, dist_logits = self.student(images)
        with torch.no_grad():
            taught = self.teacher(images)
        kd = (
            nn.functional.kl_div(dist_logits.log_softmax(1), taught.log_softmax(1), reduction="sum", log_target=True)
            / taught.numel()
        )
        loss = 0.5 * self.criterion(logits, targets) + 0.5 * kd
        loss.item()
        return {"loss": loss}


def gate(arm: Arm, exact: Step, images: Tensor, limits: tuple[float, float, float]) -> dict[str, float]:
    """Relative differences of loss, gradients and teacher features of one step from the same weights; too large ones end the benchmark."""
    (loss, gradients, features), (loss_0, gradients_0, features_0) = _one_step(arm, images), exact
    norm = torch.stack([g.norm() for g in gradients_0.values()]).norm()
    difference = torch.stack([(gradients[name] - g).norm() for name, g in gradients_0.items()]).norm()
    errors = {
        "loss": ((loss - loss_0) / loss_0).abs().item(),
        "gradients": (difference / norm).item(),
        "teacher_features": ((features - features_0).norm() / features_0.norm()).item(),
    }
    for (name, error), limit in zip(errors.items(), limits, strict=True):
        if not error <= limit:
            sys.exit(f"void: {name} differs by {error:.2g} from a plain float32 step, more than {limit:g}")
    return errors


def _one_step(arm: Arm, images: Tensor) -> Step:
    """(loss, gradients before clipping, teacher features)"""
    gradients: dict[str, Tensor] = {}

    def keep(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients[name] = parameter.grad.detach().float().clone()

    hooks = [p.register_post_accumulate_grad_hook(partial(keep, name)) for name, p in arm.student.named_parameters()]
    loss = arm.step().detach().float()
    for hook in hooks:
        hook.remove()
    return loss, gradients, arm.teacher_features(images[:4]).float()


def work_of(
    student: str, teacher: str, batch_size: int, img_size: int, device: torch.device
) -> tuple[recipes.Recipe, dict[str, Tensor], Tensor, Tensor]:
    """The same for all arms: recipe, weights of both networks, images, soft labels."""
    torch.manual_seed(0)
    overrides = [
        f"student.name={student}", f"teacher.name={teacher}", "teacher.weights=random", "optim.lr=1e-5", "optim.lr_rule=none",
        "optim.warmup_lr=1e-5", f"global_batch_size={batch_size}", "run.workers=0", f"data.img_size={img_size}",
    ]  # fmt: skip
    size = {} if img_size == 224 else {"img_size": img_size}
    networks = {"student": timm.create_model(student, num_classes=CLASSES, **size)}
    networks["teacher"] = timm.create_model(teacher, num_classes=CLASSES)
    start = {f"{which}.{name}": value for which, model in networks.items() for name, value in model.state_dict().items()}
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    return recipes.load("deit_ti", overrides), start, images, torch.randn(batch_size, CLASSES, device=device).mul(3).softmax(1)


def measure(options: argparse.Namespace, batch_size: int, device: torch.device, gpu: Device | None) -> dict[str, Any]:
    """All arms at one batch size."""
    on_gpu = device.type == "cuda"
    recipe, start, images, targets = work_of(options.student, options.teacher, batch_size, options.img_size, device)

    def arm(**run: Any) -> Arm:
        return ours(replace(recipe, run=replace(recipe.run, **run)), accelerator, start, images, targets)

    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="no")
    exact = _one_step(arm(speed="plain"), images)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")

    def peer(make: Callable[..., Any], compiled: bool = False) -> Arm:
        return theirs(make, start, (options.student, options.teacher), images, targets, compiled)

    ways: dict[str, Callable[[], Arm]] = {
        "ours, eager": partial(arm, compile=False),
        "ours, plain": partial(arm, speed="plain"),
        BASE: partial(peer, TokenDistillationTask),
        f"{BASE}, again": partial(peer, TokenDistillationTask),
        "timm feature": partial(peer, FeatureDistillationTask),
        "DeiT's loss": partial(peer, DeitTask),
        "ours, compiled": partial(arm, compile=True),
        f"{BASE}, compiled": partial(peer, TokenDistillationTask, compiled=True),
        "timm feature, compiled": partial(peer, FeatureDistillationTask, compiled=True),
    }
    if not on_gpu:
        ways[f"{BASE}, {KEPT}"] = partial(peer, TokenDistillationTask)
        ways[f"{BASE}, compiled, {KEPT}"] = partial(peer, TokenDistillationTask, compiled=True)
    wanted = {name for name in ways if not (options.quick or options.eager) or "compiled" not in name}
    if options.arms:
        if unknown := set(options.arms) - ways.keys():
            sys.exit(f"--arms: {', '.join(sorted(unknown))} unknown; known are {'; '.join(ways)}")
        wanted = {BASE, *options.arms}
    arms = {name: way() for name, way in ways.items() if name in wanted}
    limits = LIMITS["bfloat16" if on_gpu else "float32"]
    errors = {name: gate(each, exact, images, limits) for name, each in arms.items() if name.startswith("ours")}
    steps = {name: each.step for name, each in arms.items()}
    faults = {name: list[int]() for name in steps}

    def ready(name: str) -> None:
        use_memory(kept=name in ("ours, eager", "ours, compiled") or name.endswith(KEPT))
        steps[name]()  # touches its memory; what the counted step touches is touched at every step

    def faulted(name: str) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        steps[name]()
        faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    if on_gpu:
        times = cuda_rounds(steps, options.rounds, steps=20)
    else:
        times = paired_rounds({name: partial(faulted, name) for name in steps}, options.rounds, before=ready)
    rows: dict[str, dict[str, float]] = {}
    work = count_step(recipe, CLASSES, half=on_gpu)
    for name, seconds in times.items():
        middle, low, high = ratio(times[BASE], seconds)
        rows[name] = {"seconds": float(np.median(seconds)), "images_per_second": batch_size / float(np.median(seconds))}
        rows[name] |= {"ratio": middle, "low": low, "high": high, "best_to_best": min(times[BASE]) / min(seconds)}
        if not on_gpu:
            rows[name]["page_faults"] = float(np.median(faults[name]))
        if gpu is not None:
            passes = [*work.teacher, *work.student_forward, *work.student_backward]
            rows[name] |= _on_gpu(steps[name])
            rows[name]["mfu"] = sum(each.flops for each in passes) * rows[name]["images_per_second"] / gpu.flops
            rows[name]["share_of_roofline"] = seconds_of(passes, batch_size, replace(gpu, launch=0.0), 1.0) / rows[name]["seconds"]
    print(f"\n{options.student}, {options.teacher}, batch {batch_size}, {options.img_size} px, {device}")
    print(f"{'':<24}{'s a step':>10}{'images/s':>10}{'times ' + BASE:>18}   95 % interval")
    for name, row in rows.items():
        print(
            f"{name:<24}{row['seconds']:>10.4g}{row['images_per_second']:>10.4g}{row['ratio']:>18.2f}   {row['low']:.2f} to {row['high']:.2f}"
        )
    return {"batch_size": batch_size, "differences": errors, "arms": rows}


def use_memory(kept: bool) -> None:
    """Freed memory is kept, or goes back as glibc's thresholds have it once they have grown to their largest."""
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    libc = ctypes.CDLL(None)
    for what, value in ((trim_threshold, 64 << 20), (mmap_threshold, 32 << 20), (mmap_max, 65536)):
        libc.mallopt(what, value)
    libc.malloc_trim(0)
    if kept:
        acceleration.keep_memory()


def _on_gpu(step: Callable[[], Tensor]) -> dict[str, float]:
    """Peak memory, kernel launches and waits of the host in one step."""
    import warnings

    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()  # the networks of all arms
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if event.device_type == torch.profiler.DeviceType.CUDA)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(each.message) for each in caught)
    return {"peak_bytes_above_networks": torch.cuda.max_memory_allocated() - resident, "launches": launches, "host_waits": waits}


def this_gpu() -> Device:
    """What this GPU gives at most, in this run: FLOP/s of a large bfloat16 product, bytes/s of a copy, read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    seconds = cuda_rounds({"product": lambda: torch.mm(a, b), "copy": lambda: large.clone()}, 5, steps=50)
    memory = torch.cuda.get_device_properties(0).total_memory
    return Device(torch.cuda.get_device_name(), 2 * 8192**3 / min(seconds["product"]), 2 * (1 << 30) / min(seconds["copy"]), memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--teacher", default="regnety_160")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--arms", nargs="+", help=f"these, by name, beside {BASE}")
    parser.add_argument(
        "--quick", action="store_true", help="batch 2, 2 rounds, nothing compiled, nothing written unless --output says where"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    if options.quick:
        options.batch_sizes, options.rounds = [2], 2
    device = torch.device(options.device)
    gpu = this_gpu() if options.device == "cuda" else None
    batches = [measure(options, size, device, gpu) for size in options.batch_sizes]
    output = options.output or ROOT / "results" / f"speed_step_{options.device}.json"
    if options.output or not options.quick:
        content = {"command": "python -m benchmarks.step " + shlex.join(sys.argv[1:]), **facts()}
        content |= {"student": options.student, "teacher": options.teacher, "img_size": options.img_size, "rounds": options.rounds}
        output.write_text(json.dumps({**content, "gpu": gpu and asdict(gpu), "batches": batches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
