"""What a run writes and prints at its start: recipe.yaml, run.json, and lines for people."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

import deit_kd
from deit_kd import recipe as recipes
from deit_kd.data import Source
from deit_kd.distributed import fsdp
from deit_kd.distributed.accelerator import environment
from deit_kd.errors import UserError
from deit_kd.files.atomic import write_json, write_text
from deit_kd.files.documents import short
from deit_kd.files.imports import imported
from deit_kd.models import build
from deit_kd.models.summary import Plan
from deit_kd.recipe import Recipe
from deit_kd.text import for_terminal, redact, redact_path, redact_words
from deit_kd.training.run_files import plain
from deit_kd.training.run_start import Start, compare_data, on_main

if TYPE_CHECKING:
    from deit_kd.training.acceleration import Acceleration
    from deit_kd.training.task import Task


def describe(
    output: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    task: Task,
    total_steps: int,
    accelerated: Acceleration,
    sources: tuple[Source, Source],
    start: Start,
) -> None:
    """Compares what the run depends on, checks the disk, writes run.json and recipe.yaml, prints what will happen, starts the trackers.

    Raises:
        UserError: something that the run depends on has changed, or the disk is too small.
    """
    facts = task.facts()
    counted = build.make_plan(recipe, facts["data"]["num_classes"])
    needed = counted.checkpoint_bytes * (recipe.run.keep_checkpoints + 1) + 4 * counted.student_parameters
    cut = fsdp.is_sharded(task.student)

    def begin() -> None:
        accepted = compare_data(output, task, recipe, sources, start, accelerator.print)
        _must_hold(output, needed, recipe.run.on_full_disk, accelerator.print)
        run = _facts(output, recipe, accelerator, task, facts, total_steps, accelerated, counted)
        _report_other_code(start.run, run, accelerator.print)
        # run.json first: it makes the folder a run's.
        before = {
            "earlier_sessions": _earlier_sessions(start.run),
            "accepted_changes": accepted,
            "saved": start.checkpoint is not None,
        }
        write_json(output / "run.json", plain({**run, **before}))
        write_text(output / "recipe.yaml", recipes.dump(recipe))

    on_main(accelerator, begin)
    loading = f"{accelerator.num_processes} x {task.accumulation_steps} x {facts['micro_batch_size']}"
    train_images, val_images = (
        _counted(facts["data"][key], source) for key, source in zip(("train_images", "val_images"), sources, strict=True)
    )
    accelerator.print(
        f"train   {train_images} of {for_terminal(sources[0].origin)}; validation {val_images}\n"
        f"student {for_terminal(recipe.student.name)}, {counted.student_parameters:,} parameters; projector {counted.projector_parameters:,}\n"
        + "".join(
            f"teacher {for_terminal(name)}, {parameters:,} parameters, {for_terminal(teacher.cache.describe()) if teacher.cache else quick}\n"
            for (name, parameters, _), teacher, quick in zip(
                counted.teachers, dict.fromkeys(task.teachers), accelerated.teachers, strict=True
            )
        )
        + "".join(f"tap     {tap}\n" for tap in counted.taps)
        + f"steps   {total_steps:,} of {task.images_per_step} = {loading} images "
        f"(processes x accumulation x device), {'each with its part of the weights, ' if cut else ''}on {hardware(accelerator.device)}, precision {accelerator.mixed_precision}"
    )
    if recipe.run.trackers:
        accelerator.init_trackers("deit_kd", config=dict(_for_trackers(recipe)))


def _counted(images: int, source: Source) -> str:
    left_out = f" (left out: {for_terminal(source.left_out)})" if source.left_out else ""
    return f"{images:,} images{left_out}"


def _report_other_code(before: Mapping[str, Any] | None, now: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Reports what differs from the session before and may change numbers a little."""
    names = ("deit_kd", "commit", "versions", "hardware", "precision", "environment", "augmented_on", "decoded_on")
    pairs = [(name, before[name], now[name]) for name in names if before and name in before and before[name] != now[name]]
    changed = [f"{name} {short(was, 300)} -> {short(new, 300)}" for name, was, new in pairs]
    if changed:
        say(f"other than in the session before, so that numbers may differ a little: {'; '.join(changed)}")


def _must_hold(output: Path, needed: float, on_full_disk: str, say: Callable[[str], None]) -> None:
    """Refuses a disk that is too small for the checkpoints; with on_full_disk=go_on it only warns."""
    there = sum(
        file.stat().st_size for file in (output / "checkpoints").rglob("*") if file.is_file()
    )  # new checkpoints replace these
    free = shutil.disk_usage(output).free + there
    if free < needed:
        fault = f"no space left for checkpoints in {output}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        if on_full_disk == "stop":
            raise UserError(f"{fault}; free some, give another --output, or lower run.keep_checkpoints")
        say(f"{fault}; the run goes on without those that do not fit")


def _facts(
    output: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    task: Task,
    facts: dict[str, Any],
    total_steps: int,
    accelerated: Acceleration,
    counted: Plan,
) -> dict[str, Any]:
    """What run.json says of the run as it is started now."""
    tune, weights = recipe.finetune, task.depends_on["starting_weights"]
    return {
        "name": output.resolve().name,
        "deit_kd": deit_kd.__version__,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *redact_words(sys.argv[1:])]),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors", "pillow")},
        "hardware": hardware(accelerator.device),
        "precision": accelerator.mixed_precision,
        "environment": environment(),
        "imports": imported(),
        "processes": accelerator.num_processes,
        "sharded": fsdp.is_sharded(task.student),
        "speed": asdict(accelerated),
        "total_steps": total_steps,
        **facts,
        "student": {"parameters": counted.student_parameters, "gmacs": counted.student_gmacs},
        "finetuned_from": tune and {"source": redact_path(tune.weights), "sha256": weights, **facts["finetuned_from"]},
        "projector_parameters": counted.projector_parameters,
        "teachers": [
            {**teacher, "gmacs": gmacs} for teacher, (_, _, gmacs) in zip(facts["teachers"], counted.teachers, strict=True)
        ],
    }


def _for_trackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The recipe's keys and values without paths and secrets, because a tracker may upload them."""
    paths = ("name", "weights", "cache", "class_means")
    for key, value in recipes.flatten(recipe):
        yield key, redact_path(str(value)) if key.rpartition(".")[2] in paths else redact(str(value))


def _earlier_sessions(before: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What run.json holds of the sessions before this one, so that a card describes all of them."""
    if before is None:
        return []
    kept = ("command", "commit", "hardware", "processes", "micro_batch_size", "precision", "augmented_on", "decoded_on", "speed")
    return [*before.get("earlier_sessions", []), {key: before[key] for key in (*kept, "environment") if key in before}]


def commit() -> str:
    """The commit of the code, with +changes when files differ from it."""
    folder = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: torch.device) -> str:
    """The device that this process trains on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores ({platform.machine()})"
