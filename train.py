"""Distils a CNN teacher into a DeiT student: a run from start to end.

accelerate launch train.py --recipe deit_ti --data DIR --output runs/deit_ti
python train.py --recipe quickstart optim.lr=5e-4
python train.py --recipe deit_ti --dry-run
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deit_kd.errors import outside_of_the_environment

try:
    from deit_kd import recipe as recipes
    from deit_kd.cli import streams
    from deit_kd.cli.train import errors_in_one_line, listen, parse
    from deit_kd.files.imports import import_file
    from deit_kd.training.signals import REQUEUE
except ModuleNotFoundError as error:
    outside_of_the_environment(error)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from deit_kd.training.run_start import Start


def main(arguments: list[str] | None = None) -> None:
    """Trains, exports, writes card and plots; user errors end in one line and exit code 2."""
    streams.forgive()
    options = parse(arguments)
    output = options.output or recipes.run_folder(options.recipe)
    with errors_in_one_line(output):
        for file in options.imports:
            import_file(file)
        recipe = recipes.load(options.recipe, options.overrides)
        if recipe.finetune is not None or recipe.follows_teacher():
            from deit_kd.models.build import resolve

            recipe = resolve(recipe)
        dry_run(recipe, options, output) if options.dry_run else train(recipe, options, output)


def dry_run(recipe: recipes.Recipe, options: argparse.Namespace, output: Path) -> None:
    from deit_kd.distributed.accelerator import make_accelerator
    from deit_kd.tasks import ready

    accelerator = make_accelerator(recipe.run, recipe.optim.clip_grad, options.device, output)
    checks = ready.Checks(
        recipe, options.data, accelerator, options.device_batch_size, True, output, options.resume, options.accept_changes
    )
    ready.dry_run(checks, accelerator.print)


def train(recipe: recipes.Recipe, options: argparse.Namespace, output: Path) -> None:
    from deit_kd.distributed import fsdp
    from deit_kd.distributed.accelerator import make_accelerator
    from deit_kd.training import run_start

    sharded = fsdp.fsdp_requested()
    accelerator = make_accelerator(recipe.run, recipe.optim.clip_grad, options.device, output)
    with run_start.entered(output, recipe, options.resume, options.accept_changes, options.data, accelerator) as start:
        complete = train_in(output, recipe, options, accelerator, sharded, start)
    if not complete:
        sys.exit(REQUEUE)


def train_in(
    output: Path, recipe: recipes.Recipe, options: argparse.Namespace, accelerator: Accelerator, sharded: bool, start: Start
) -> bool:
    from deit_kd.data.build import example_images
    from deit_kd.models.build import build_teachers
    from deit_kd.tasks import TASKS, outcome, ready
    from deit_kd.training import acceleration, metrics, optim, run_folder, setup
    from deit_kd.training.best import Best
    from deit_kd.training.loop import fit

    with accelerator.main_process_first():  # one process downloads, the others find it
        sources = ready.check_start(recipe, options.data, accelerator, options.device_batch_size)
    teachers = [teacher.to(accelerator.device) for teacher in build_teachers(recipe, sources[0].class_names)]
    example = partial(example_images, sources[1], recipe.data, recipe.evaluation)
    accelerated = acceleration.prepare(recipe.run, teachers, example, accelerator, sharded)
    task = TASKS[recipe.task](
        recipe, accelerator, sources, teachers, output, options.device_batch_size, accelerator.print, accelerated.compiled
    )
    make_optimizer = partial(optim.build_optimizer, recipe.optim, recipe.finetune, recipe.lr_factor())
    optimizer, ema = setup.prepare(task, make_optimizer, recipe.ema_decay, accelerator, sharded)
    schedule = optim.build_schedule(recipe.optim, recipe.lr_factor(), recipe.epochs, task.steps_per_epoch)

    total_steps = recipe.epochs * task.steps_per_epoch
    stop_at = min(total_steps, options.max_steps or total_steps)
    run_folder.describe(output, recipe, accelerator, task, total_steps, accelerated, sources, start)
    tracker = metrics.Tracker(accelerator, output, stop_at, goes_on=recipe.run.on_full_disk == "go_on")
    task.evaluate_teachers(tracker, first=start.checkpoint is None)
    by_holdout = recipe.finetune is not None and recipe.finetune.holdout > 0
    best = Best(accelerator, task.student, ema, by_holdout) if recipe.run.keep_best else None
    complete = fit(
        task,
        accelerator,
        optimizer,
        schedule,
        recipe.run,
        tracker,
        output,
        total_steps=stop_at,
        clip_grad=recipe.optim.clip_grad,
        reads_every_step=sharded or accelerator.device.type == "cpu",
        ema=ema,
        resume=start.checkpoint,
        best=best,
    )
    if accelerated.compiled and not tracker.lines("compiled"):
        tracker.log("compiled", stop_at, acceleration.compiled_graphs())
    if complete:
        outcome.write(task, recipe, accelerator, output, ema, best, sources[0].class_names, tracker)
    tracker.close()
    return complete


if __name__ == "__main__":
    listen()
    main()
