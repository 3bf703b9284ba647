"""Checks of an environment before a run: one line a check, alone or under any launcher."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from deit_kd import recipe as recipes
from deit_kd.data.build import loader_config
from deit_kd.data.sources.fingerprint import fingerprint
from deit_kd.data.transforms import evaluation_transform
from deit_kd.data.workers import cores
from deit_kd.errors import UserError
from deit_kd.files.warn import collected
from deit_kd.models import build
from deit_kd.profiling import machine
from deit_kd.recipe import Recipe
from deit_kd.tasks import ready
from deit_kd.tasks.ready import Line

SEVERITY = {"ok": 0, "warn": 1, "fail": 2}  # the exit code is that of the worst line
LOWEST = {"torch": "2.11", "torchvision": "0.26", "timm": "1.0.31", "accelerate": "1.15"}
SLOW, CLOCK, BANDWIDTH = 1.5, 5.0, 1e9  # slowest over fastest process; seconds; bytes a second between processes on GPUs


def run_checks(
    recipe: Recipe, data: Path | None, output: Path, accelerator: Accelerator, fault: str | None = None
) -> Iterator[Line]:
    """Yields a line for each check, the same in every process. A check that raises gives a line, too. `fail` would end a run, `warn` would not.

    Args:
        recipe: whose data, teacher and student are looked at; `build.resolve`d.
        data: the folder of the data; None looks at no data, but for those that are embedded.
        output: the run folder; nothing is made or moved there.
        accelerator: of this process.
        fault: why the processes of a run could not be started as the recipe says.
    """
    start = ready.Checks(recipe, data, accelerator, None, reads_weights=True, output=output)
    checks: dict[str, Callable[[], Line]] = {
        "versions": lambda: _versions(accelerator),
        "devices": lambda: _devices(accelerator),
        "processes": lambda: _processes(accelerator),
        "all-reduce": lambda: _all_reduce(accelerator),
        "speed": lambda: _speed(accelerator),
        "clock": lambda: _clock(accelerator),
        "settings": lambda: (
            Line("fail", "settings", fault) if fault else Line("ok", "settings", f"precision {accelerator.mixed_precision}")
        ),
        "recipe": lambda: _same("recipe", recipes.dump(recipe), "every process reads the same recipe", accelerator),
    }
    found = ready.look(start)
    checks |= {name: partial(next, found) for name in start.checks()}
    checks["data"] = lambda: _same_data(next(found), start, accelerator)
    folder = next(path for path in (output.resolve(), *output.resolve().parents) if path.is_dir())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = loader_config(recipe.data, recipe.run, accelerator, lambda _: None).workers
    checks |= {
        "memory": lambda: _shared_memory(start, local),
        "workers": lambda: _workers(recipe, start, count),
        "files": lambda: machine.descriptors(count, local),
    }
    checks |= {name: partial(machine.disk_operation, name, folder) for name in machine.DISK_OPERATIONS}
    checks |= {"disk": lambda: _disk(recipe, start, folder, accelerator), "port": lambda: _port(accelerator)}
    for name, check in checks.items():
        warnings: list[str] = []
        try:
            with collected(warnings.append):
                line = check()
        except (UserError, OSError, RuntimeError) as error:
            line = Line("fail", name, " ".join(str(error).split())[:300])
        except Exception as error:  # an unexpected error is a line as well
            line = Line("fail", name, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        if doubtful := start.new(warnings):
            severity = "warn" if line.severity == "ok" else line.severity
            line = Line(severity, name, "; ".join([line.text, *doubtful]))
        yield max(_everywhere(line, accelerator), key=lambda each: SEVERITY[each.severity])


def verdict(lines: Sequence[Line]) -> str:
    """The last line: the checks that would end a run, and those that only warn."""
    fails, warns = ([line.name for line in lines if line.severity == severity] for severity in ("fail", "warn"))
    if not fails and not warns:
        return "all is well: a run would start"
    ends = f"a run would end because of: {', '.join(fails)}" if fails else "nothing would end a run"
    return ends + (f"; only warnings: {', '.join(warns)}" if warns else "")


def _everywhere(value: Any, accelerator: Accelerator) -> list[Any]:
    """The value of each process; on one process gather_object would flatten a list."""
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
    name = torch.cuda.get_device_name(accelerator.device) if gpu else f"CPU, {cores()} cores"
    places = [f"{rank}: {where}" for rank, where in enumerate(_everywhere(f"{name} on {socket.gethostname()}", accelerator))]
    text = "; ".join(places[:16]) + ("; ..." if len(places) > 16 else "")
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
        return Line("warn", "speed", f"{text}: all processes wait for it; is something else running there?")
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


def _same_data(line: Line, start: ready.Checks, accelerator: Accelerator) -> Line:
    """The line of the data check, unless another process has other data."""
    fingerprints = line.text
    if start.sources:
        train, val = start.sources
        fingerprints = f"{fingerprint(train)} {fingerprint(val)} {train.class_names}"
    same = _same("data", fingerprints, line.text, accelerator)
    return line if line.severity != "ok" else same


def _workers(recipe: Recipe, start: ready.Checks, count: int) -> Line:
    if start.sources is None:
        return Line("warn", "workers", "not checked: there are no images")
    size = start.loaders.train.micro_batch_size if start.loaders else recipe.global_batch_size
    return machine.workers(
        count, start.sources[0], evaluation_transform(recipe.data, recipe.evaluation), recipe.data.img_size, size
    )


def _shared_memory(start: ready.Checks, local: int) -> Line:
    if start.loaders is None:
        return Line("warn", "memory", "not checked: there is no batch")
    return machine.shared_memory(start.loaders.train, local)


def _disk(recipe: Recipe, start: ready.Checks, folder: Path, accelerator: Accelerator) -> Line:
    if not accelerator.is_main_process:
        return Line("ok", "disk", "")
    try:
        counted = build.make_plan(recipe, len(start.sources[0].class_names) if start.sources else None)
    except UserError:
        return Line("warn", "disk", "not checked: the networks cannot be counted, see above")
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
