"""What is wrong with an environment, before a run finds out: one line a check, alone or under any launcher."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from deit_kd import build, plan
from deit_kd import recipe as recipes
from deit_kd.class_means import fingerprint
from deit_kd.errors import UserError
from deit_kd.recipe import Recipe

SEVERITY = {"ok": 0, "warn": 1, "fail": 2}  # the exit code is that of the worst line
LOWEST = {"torch": "2.11", "torchvision": "0.26", "timm": "1.0.31", "accelerate": "1.15"}
SLOW, CLOCK, BANDWIDTH = 1.5, 5.0, 1e9  # slowest over fastest process; seconds; bytes a second between processes on GPUs


class Line(NamedTuple):
    """A finding: ok, warn or fail; what was looked at; what was found, with the remedy if it is not well."""

    severity: str
    name: str
    text: str


def examine(recipe: Recipe, data: Path | None, output: Path, accelerator: Accelerator) -> Iterator[Line]:
    """Lines, in every process the same. A check that breaks is a line too, not the end.

    Args:
        recipe: whose data, size and student are looked at.
        data: the folder of the data; None looks at no data, but for those that are embedded.
        output: where runs would be kept.
        accelerator: of this process.
    """
    checks: dict[str, Callable[[], Line]] = {
        "versions": lambda: _versions(accelerator),
        "devices": lambda: _devices(accelerator),
        "processes": lambda: _processes(accelerator),
        "all-reduce": lambda: _all_reduce(accelerator),
        "speed": lambda: _speed(accelerator),
        "clock": lambda: _clock(accelerator),
        "recipe": lambda: _same("recipe", recipes.dump(recipe), "every process reads the same recipe", accelerator),
        "data": lambda: _data(recipe, data, accelerator),
        "disk": lambda: _disk(recipe, output, accelerator),
        "port": lambda: _port(accelerator),
    }
    for name, check in checks.items():
        try:
            line = check()
        except (UserError, OSError, RuntimeError) as error:
            line = Line("fail", name, " ".join(str(error).split())[:300])
        yield max(_everywhere(line, accelerator), key=lambda each: SEVERITY[each.severity])


def _everywhere(value: Any, accelerator: Accelerator) -> list[Any]:
    """The value of each process; alone gather_object would take a list apart."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]  # type: ignore[no-any-return]


def _versions(accelerator: Accelerator) -> Line:
    found = {name: version(name) for name in LOWEST}
    text = f"python {platform.python_version()}, " + ", ".join(f"{name} {number}" for name, number in found.items())

    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())

    if old := [f"{name} {LOWEST[name]}" for name in LOWEST if number(found[name]) < number(LOWEST[name])]:
        return Line("fail", "versions", f"{text}; needs at least {', '.join(old)}: pip install -r requirements.txt")
    return _same("versions", text, text, accelerator)


def _devices(accelerator: Accelerator) -> Line:
    gpu = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name(accelerator.device) if gpu else f"CPU, {len(os.sched_getaffinity(0))} cores"
    told = [f"{rank}: {where}" for rank, where in enumerate(_everywhere(f"{name} on {socket.gethostname()}", accelerator))]
    text = "; ".join(told[:16]) + ("; ..." if len(told) > 16 else "")
    if not gpu and shutil.which("nvidia-smi") and os.environ.get("ACCELERATE_USE_CPU") is None:
        return Line(
            "warn", "devices", f"{text}; nvidia-smi is here but torch finds no GPU: install a CUDA build of torch, or a driver"
        )
    return Line("ok", "devices", text)


def _processes(accelerator: Accelerator) -> Line:
    launched, found = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if launched != found:
        return Line(
            "fail",
            "processes",
            f"WORLD_SIZE={launched}, but {found} found each other: see launch/README.md for a command that fits",
        )
    return Line("ok", "processes", f"{found}")


def _all_reduce(accelerator: Accelerator) -> Line:
    if accelerator.num_processes == 1:
        return Line("ok", "all-reduce", "one process")
    mine = torch.full((4_000_000,), float(accelerator.process_index + 1), device=accelerator.device)
    times = []
    for _ in range(4):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        total = accelerator.reduce(mine, reduction="sum")[0].item()
        times.append(time.perf_counter() - started)
    processes = accelerator.num_processes
    if total != processes * (processes + 1) / 2:
        return Line(
            "fail", "all-reduce", f"the sum over {processes} processes is {total:g}, not {processes * (processes + 1) / 2:g}"
        )
    rate = mine.nbytes / min(times)
    slow = accelerator.device.type == "cuda" and rate < BANDWIDTH
    remedy = "; slow for GPUs: look at NCCL_DEBUG=INFO for the network that it took" if slow else ""
    return Line("warn" if slow else "ok", "all-reduce", f"sum right, {rate / 1e9:.2f} GB/s of 16 MB{remedy}")


def _speed(accelerator: Accelerator) -> Line:
    x = torch.randn(1024, 1024, device=accelerator.device)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        (x @ x).sum().item()
        times.append(time.perf_counter() - started)
    seconds = _everywhere(min(times), accelerator)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    text = f"a product of matrices takes {min(seconds) * 1000:.2f} to {max(seconds) * 1000:.2f} ms, longest on process {slowest}"
    if max(seconds) > SLOW * min(seconds):
        return Line("warn", "speed", f"{text}: everybody waits for it; is something else running there?")
    return Line("ok", "speed", text)


def _clock(accelerator: Accelerator) -> Line:
    accelerator.wait_for_everyone()
    times = _everywhere(time.time(), accelerator)
    apart = max(times) - min(times)
    if apart > CLOCK:
        return Line("warn", "clock", f"the machines' clocks are {apart:.1f} s apart: start a time service (chrony, ntpd)")
    return Line("ok", "clock", f"{apart:.2f} s apart")


def _same(name: str, value: str, text: str, accelerator: Accelerator) -> Line:
    seen = _everywhere(hashlib.sha256(value.encode()).hexdigest()[:12], accelerator)
    other = next((rank for rank, each in enumerate(seen) if each != seen[0]), None)
    if other is not None:
        return Line("fail", name, f"process {other} has another {name} than process 0 ({seen[other]}, {seen[0]}): make them one")
    return Line("ok", name, text)


def _data(recipe: Recipe, data: Path | None, accelerator: Accelerator) -> Line:
    if data is None and recipe.data.source != "fashion_mnist":
        return Line("warn", "data", "not looked at: pass --data")
    fault, told = None, ""
    try:
        train, val = build.open_data(recipe, data)
        told = f"{len(train):,} training and {len(val):,} validation images of {train.origin}"
        print_of_data = f"{fingerprint(train)} {fingerprint(val)} {train.class_names}"
    except Exception as error:  # whatever is wrong with data is a line, on every process
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        fault, print_of_data = told, told
    same = _same("data", print_of_data, told, accelerator)
    return Line("fail", "data", fault) if fault else same


def _disk(recipe: Recipe, output: Path, accelerator: Accelerator) -> Line:
    if not accelerator.is_main_process:
        return Line("ok", "disk", "")
    folder = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    counted = plan.make_plan(recipe, None)
    needed = counted.checkpoint_bytes * (recipe.run.keep_checkpoints + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        return Line(
            "fail", "disk", f"{folder}: {free / 1e6:,.0f} MB free, checkpoints need {needed / 1e6:,.0f} MB: give another --output"
        )
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor") as file:
        file.write(os.urandom(counted.checkpoint_bytes))
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    text = f"{folder}: {free / 1e9:,.1f} GB free, a checkpoint of {counted.checkpoint_bytes / 1e6:.0f} MB is written in {seconds:.1f} s"
    return Line("warn" if seconds > 30 else "ok", "disk", text + ("; raise run.save_every_steps" if seconds > 30 else ""))


def _port(accelerator: Accelerator) -> Line:
    if accelerator.num_processes > 1:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection((host, port), timeout=10):
            return Line("ok", "port", f"every process reaches {host}:{port}")
    with socket.socket() as probe:
        try:
            probe.bind(("", 29500))
        except OSError:
            return Line("warn", "port", "29500 is taken: set PORT for a launcher of several machines")
    return Line("ok", "port", "29500 is free")
