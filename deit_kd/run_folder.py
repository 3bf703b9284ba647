"""The folder of a run: recipe.yaml, run.json, and whether to go on in it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

import deit_kd
from deit_kd import checkpoint, plan, processes, sharding
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.files import sha256
from deit_kd.models import CachedTeacher
from deit_kd.models.loading import file_of
from deit_kd.recipe import Recipe
from deit_kd.text import for_terminal, redact, redact_path, redact_words

if TYPE_CHECKING:
    from deit_kd.classification import Classification
    from deit_kd.data import Source
    from deit_kd.speed import Quickened


def prepare(output: Path, recipe: Recipe, resume: str, accelerator: Accelerator) -> Path | None:
    """Makes the folder and finds the checkpoint to go on from.

    Args:
        output: the run folder.
        recipe: the resolved recipe; a folder of another one is refused.
        resume: auto, none, or the path of a checkpoint. With none an existing run is moved aside, not deleted.
        accelerator: for doing this once and telling people.

    Raises:
        UserError: the folder is of another recipe, or the checkpoint is not there.
        OSError: the folder cannot be made or moved.
    """
    chosen: list[str | None] = [None]
    if accelerator.is_main_process:
        if resume == "none" and output.is_dir() and any(output.iterdir()):
            aside = output.with_name(f"{output.resolve().name}.{time.strftime('%Y%m%d-%H%M%S')}")
            output.rename(aside)
            accelerator.print(f"the run that was in {output} is now in {aside}")
        output.mkdir(parents=True, exist_ok=True)
        if (output / "recipe.yaml").exists():
            changed = recipes.differences(recipes.load(output / "recipe.yaml"), recipe)
            if changed:
                raise UserError(
                    f"--output {output}: holds a run of another recipe ({'; '.join(changed[:5])}); give another --output, or "
                    "--resume none to move that run aside"
                )
        folder = output / "checkpoints"
        path = (
            checkpoint.newest(folder, accelerator.print, recipes.fingerprint(recipe))
            if resume in ("auto", "none")
            else Path(resume)
        )
        if path:
            checkpoint.load(path)  # says now what is wrong with it
            accelerator.print(f"going on from {path}")
        else:
            (output / "metrics.jsonl").unlink(missing_ok=True)  # of a start that saved nothing
        checkpoint.set_aside_after(folder, path, accelerator.print)
        chosen = [str(path) if path else None]
    broadcast_object_list(chosen)  # one process looks, all go on from the same
    return Path(chosen[0]) if chosen[0] else None


def describe(
    output: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    task: Classification,
    total_steps: int,
    quickened: Quickened,
    resumed: bool,
) -> None:
    """Writes recipe.yaml and run.json, says what will happen, checks the disk, and starts the trackers."""
    counted = plan.make_plan(recipe, task.num_classes)
    needed = counted.checkpoint_bytes * (recipe.run.keep_checkpoints + 1) + 4 * counted.student_parameters
    loader, val, cut = task.train_loader, task.val_loader.source, sharding.is_sharded(task.student)
    if accelerator.is_main_process:
        there = sum(
            file.stat().st_size for file in (output / "checkpoints").rglob("*") if file.is_file()
        )  # new ones push these out
        free = shutil.disk_usage(output).free + there
        if free < needed:
            fault = f"no space left for checkpoints in {output}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
            if recipe.run.on_full_disk == "stop":
                raise UserError(f"{fault}; free some, give another --output, or lower run.keep_checkpoints")
            accelerator.print(f"{fault}; the run goes on without those that do not fit")
        (output / "recipe.yaml").write_text(recipes.dump(recipe))
        file = file_of(recipe.finetune.weights) if recipe.finetune else None
        weights = None if file is None else sha256(file)
        run = {
            "name": output.resolve().name,
            "deit_kd": deit_kd.__version__,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *redact_words(sys.argv[1:])]),
            "commit": commit(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors", "pillow")},
            "hardware": hardware(accelerator.device),
            "earlier_sessions": _earlier_sessions(output) if resumed else [],
            "precision": accelerator.mixed_precision,
            "environment": processes.environment(),
            "augmented_on": loader.augments_on,
            "decoded_on": loader.decodes_on,
            "processes": accelerator.num_processes,
            "sharded": cut,
            "speed": asdict(quickened),
            "accumulation_steps": task.accumulation_steps,
            "micro_batch_size": loader.micro_batch_size,
            "global_batch_size": loader.global_batch_size,
            "total_steps": total_steps,
            "data": {
                "name": val.name,
                "train_images": len(loader.source),
                "val_images": len(val),
                "num_classes": task.num_classes,
            },
            "student": {"parameters": counted.student_parameters, "gmacs": counted.student_gmacs},
            "finetuned_from": recipe.finetune
            and {"source": redact_path(recipe.finetune.weights), "sha256": weights, **task.origin},
            "held_out_images": len(task.holdout_loader.source) if task.holdout_loader else 0,
            "projector_parameters": counted.projector_parameters,
            "teachers": [
                {
                    **teacher.info.told(),
                    "gmacs": gmacs,
                    "img_size": teacher.img_size or recipe.data.img_size,
                    "cache": teacher.told() if isinstance(teacher, CachedTeacher) else None,
                }
                for teacher, (_, _, gmacs) in zip(dict.fromkeys(task.teachers), counted.teachers, strict=True)
            ],
        }
        (output / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    loading = f"{accelerator.num_processes} x {loader.accumulation_steps} x {loader.micro_batch_size}"
    accelerator.print(
        f"train   {_counted(loader.source)} of {for_terminal(loader.source.origin)}; validation {_counted(val)}\n"
        f"student {for_terminal(recipe.student.name)}, {counted.student_parameters:,} parameters; projector {counted.projector_parameters:,}\n"
        + "".join(
            f"teacher {for_terminal(name)}, {parameters:,} parameters, {for_terminal(teacher.describe()) if isinstance(teacher, CachedTeacher) else quick}\n"
            for (name, parameters, _), teacher, quick in zip(
                counted.teachers, dict.fromkeys(task.teachers), quickened.teachers, strict=True
            )
        )
        + "".join(f"tap     {tap}\n" for tap in counted.taps)
        + f"steps   {total_steps:,} of {loader.global_batch_size} = {loading} images "
        f"(processes x accumulation x device), {'each with its part of the weights, ' if cut else ''}on {hardware(accelerator.device)}, precision {accelerator.mixed_precision}"
    )
    if recipe.run.trackers:
        accelerator.init_trackers("deit_kd", config=dict(_for_trackers(recipe)))


def _counted(source: Source) -> str:
    left_out = f" (left out: {for_terminal(source.left_out)})" if source.left_out else ""
    return f"{len(source):,} images{left_out}"


def _for_trackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The recipe for a tracker, which may send it elsewhere."""
    paths = ("name", "weights", "cache", "class_means")
    for key, value in recipes.flatten(recipe):
        yield key, redact_path(str(value)) if key.rpartition(".")[2] in paths else redact(str(value))


def _earlier_sessions(output: Path) -> list[dict[str, Any]]:
    """What run.json says of the sessions before this one: a card must not speak of the last alone."""
    file = output / "run.json"
    before = json.loads(file.read_text()) if file.exists() else None
    if before is None:
        return []
    told = ("command", "commit", "hardware", "processes", "micro_batch_size", "precision", "augmented_on", "decoded_on", "speed")
    return [*before["earlier_sessions"], {key: before[key] for key in (*told, "environment") if key in before}]


def commit() -> str:
    """The commit of the code, with +changes when files differ from it."""
    folder = Path(__file__).parent

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
