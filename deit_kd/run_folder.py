"""The folder of a run: recipe.yaml, run.json, and whether to go on in it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

import deit_kd
from deit_kd import checkpoint, plan
from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.recipe import Recipe

if TYPE_CHECKING:
    from deit_kd.classification import Classification


def prepare(output: Path, recipe: Recipe, resume: str, accelerator: Accelerator) -> Path | None:
    """Makes the folder and finds the checkpoint to go on from.

    Args:
        output: the run folder.
        recipe: the resolved recipe; a folder of another one is refused.
        resume: auto, none, or the path of a checkpoint. With none an existing run is moved aside, not deleted.
        accelerator: for doing this once and telling people.

    Raises:
        UserError: the folder is of another recipe, cannot be made, or the checkpoint is not there.
    """
    stored = output / "recipe.yaml"
    if accelerator.is_main_process:
        if resume == "none" and stored.exists():
            aside = output.with_name(f"{output.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            output.rename(aside)
            accelerator.print(f"the run that was in {output} is now in {aside}")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be made ({error.strerror}); give another folder") from None
        if stored.exists():
            changed = recipes.differences(recipes.load(stored), recipe)
            if changed:
                raise UserError(
                    f"--output {output}: holds a run of another recipe ({'; '.join(changed[:5])}); give another --output, or "
                    "--resume none to move that run aside"
                )
        stored.write_text(recipes.dump(recipe))
    accelerator.wait_for_everyone()
    if resume in ("auto", "none"):
        path = checkpoint.newest(output / "checkpoints", accelerator.print)
    else:
        path = Path(resume)
        checkpoint.load(path)  # says now what is wrong with it
    if path:
        accelerator.print(f"going on from {path}")
    elif accelerator.is_main_process:
        (output / "metrics.jsonl").unlink(missing_ok=True)  # of a start that saved nothing
    return path


def describe(
    output: Path, recipe: Recipe, options: argparse.Namespace, accelerator: Accelerator, task: Classification, total_steps: int
) -> None:
    """Writes run.json, says what will happen, checks the disk, and starts the trackers."""
    counted = plan.make_plan(recipe, task.num_classes)
    needed = counted.checkpoint_bytes * (recipe.run.keep_checkpoints + 1) + 4 * counted.student_parameters
    loader, val = task.train_loader, task.val_loader.source
    if accelerator.is_main_process:
        free = shutil.disk_usage(output).free
        if free < needed:
            raise UserError(
                f"no space left for checkpoints in {output}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; "
                "free some, give another --output, or lower run.keep_checkpoints"
            )
        run = {
            "name": output.name,
            "deit_kd": deit_kd.__version__,
            "command": shlex.join(["python", *(_without_folders(word) for word in sys.argv)]),
            "commit": commit(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors", "pillow")},
            "hardware": hardware(accelerator.device),
            "precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
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
            "projector_parameters": counted.projector_parameters,
            "teacher": None if task.teacher is None else _teacher(task, counted),
        }
        (output / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    loading = f"{loader.num_processes} x {loader.accumulation_steps} x {loader.micro_batch_size}"
    accelerator.print(
        f"train   {len(loader.source):,} images of {loader.source.origin}; validation {len(val):,} images\n"
        f"student {recipe.student.name}, {counted.student_parameters:,} parameters; projector {counted.projector_parameters:,}\n"
        + (f"teacher {task.teacher.info.name}, {counted.teacher_parameters:,} parameters\n" if task.teacher else "teacher none\n")
        + f"steps   {total_steps:,} of {loader.global_batch_size} = {loading} images "
        f"(processes x accumulation x device), on {hardware(accelerator.device)}, precision {accelerator.mixed_precision}"
    )
    if recipe.run.trackers:
        accelerator.init_trackers("deit_kd", config={key: str(value) for key, value in recipes.flatten(recipe)})


def _teacher(task: Classification, counted: plan.Plan) -> dict[str, Any]:
    assert task.teacher is not None
    info = asdict(task.teacher.info)
    return {**info, "gmacs": counted.teacher_gmacs}


def _without_folders(word: str) -> str:
    """A card is public, and where its author keeps things is not its business."""
    return f".../{Path(word).name}" if Path(word).is_absolute() else word


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
