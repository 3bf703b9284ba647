"""Distils a CNN teacher into a DeiT student: the whole story of a run, told once.

accelerate launch train.py --recipe deit_ti --data DIR --output runs/deit_ti
python train.py --recipe quickstart optim.lr=5e-4
python train.py --recipe deit_ti --dry-run
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deit_kd.errors import UserError, outside_of_the_environment

try:
    from deit_kd import __version__
    from deit_kd import recipe as recipes
    from deit_kd.cli import streams
    from deit_kd.cli.command_line import Parser, bounded
    from deit_kd.text import error_for_terminal
    from deit_kd.training.signals import REQUEUE, heard
except ModuleNotFoundError as error:
    outside_of_the_environment(error)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from deit_kd.training.run_start import Start


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        description="Distil a CNN teacher into a DeiT student, as a recipe says.",
        epilog=f"recipes:\n{recipes.overview()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", help="a name from below, such as deit_ti or deit_vkd:small, or the path of a YAML file")
    add("--data", type=Path, help="the folder of the data; Fashion-MNIST needs none, a subset of it is embedded")
    add("--output", type=Path, help="the run folder (default: runs/RECIPE, or the folder of the run that --recipe names)")
    add(
        "--resume",
        default="auto",
        help="auto (default): go on if the run folder holds a checkpoint; none: start anew; or a checkpoint",
    )
    add("--accept-changes", metavar="KEYS", help="go on although what these name is another now; a refusal says which to give")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add("--device-batch-size", type=bounded(int, 1, 10**6), help="most images on a device at once; more are accumulated")
    add("--max-steps", type=bounded(int, 1, 10**12), help="stop after so many optimizer steps; the schedule stays that of the run")
    add("--dry-run", action="store_true", help="print networks, shapes, memory and compute; train nothing")
    add("--version", action="version", version=f"deit_kd {__version__}")
    add("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as optim.lr=1e-3 epochs=3")
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is None:
        parser.error(f"--recipe is missing: one of these, or the path of a YAML file\n{recipes.overview()}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Trains, exports, writes card and plots; user errors end in one line and exit code 2."""
    streams.forgive()
    options = parse(arguments)
    output = options.output or recipes.run_folder(options.recipe)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        if recipe.finetune is not None or recipe.follows_teacher():
            from deit_kd.models.build import resolve

            recipe = resolve(recipe)
        dry_run(recipe, options, output) if options.dry_run else train(recipe, options, output)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(f"interrupted; {kept(output)}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fail(f"no space left on the device of {output}: free some, or give another --output; the last whole checkpoint is kept")
        fail(f"{error.filename or output}: {error.strerror or error}; check the path and its permissions")
    except RuntimeError as error:
        if type(error).__name__ in ("InductorError", "BackendCompilerFailed"):
            fail(f"torch.compile: {str(error).strip().splitlines()[0]}; install a C++ compiler, or set run.compile=false")
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fail(f"out of memory on the device: halve what it holds at once with --device-batch-size ({str(error).splitlines()[0]})")


def kept(output: Path) -> str:
    if any((output / "checkpoints").glob("step_*")):
        return "its last checkpoint is kept, and the same command goes on from it"
    return "nothing was saved yet, and the same command begins anew"


def fail(message: str) -> NoReturn:
    print(f"error: {error_for_terminal(message)}", file=sys.stderr)
    sys.exit(2)


def dry_run(recipe: recipes.Recipe, options: argparse.Namespace, output: Path) -> None:
    from deit_kd.distributed.accelerator import make_accelerator
    from deit_kd.tasks import ready

    accelerator = make_accelerator(recipe, options.device, output)
    checks = ready.Checks(
        recipe, options.data, accelerator, options.device_batch_size, True, output, options.resume, options.accept_changes
    )
    ready.rehearse(checks, accelerator.print)


def train(recipe: recipes.Recipe, options: argparse.Namespace, output: Path) -> None:
    from deit_kd.distributed import fsdp
    from deit_kd.distributed.accelerator import make_accelerator
    from deit_kd.training import run_start

    sharded = fsdp.fsdp_requested()
    accelerator = make_accelerator(recipe, options.device, output)
    with run_start.entered(output, recipe, options.resume, options.accept_changes, options.data, accelerator) as start:
        complete = train_in(output, recipe, options, accelerator, sharded, start)
    if not complete:
        sys.exit(REQUEUE)


def train_in(
    output: Path, recipe: recipes.Recipe, options: argparse.Namespace, accelerator: Accelerator, sharded: bool, start: Start
) -> bool:
    from deit_kd.models.build import build_teachers, example_images
    from deit_kd.tasks import outcome, ready
    from deit_kd.tasks.classification import Classification
    from deit_kd.training import acceleration, metrics, optim, run_folder, setup
    from deit_kd.training.best import Best
    from deit_kd.training.loop import fit
    from deit_kd.training.task import Loop

    say, resume = accelerator.print, start.checkpoint

    with accelerator.main_process_first():  # one process downloads, the others find it
        sources = ready.must_start(recipe, options.data, accelerator, options.device_batch_size)
    teachers = [teacher.to(accelerator.device) for teacher in build_teachers(recipe, sources[0].class_names)]
    accelerated = acceleration.prepare(recipe.run, teachers, partial(example_images, recipe, sources[1]), accelerator, sharded)
    task = Classification(recipe, accelerator, sources, teachers, output, options.device_batch_size, say, accelerated.compiled)
    optimizer, ema = setup.prepare(task, recipe, accelerator, sharded)

    total_steps = recipe.epochs * task.steps_per_epoch
    stop_at = min(total_steps, options.max_steps or total_steps)
    run_folder.describe(output, recipe, accelerator, task, total_steps, accelerated, sources, start)
    tracker = metrics.Tracker(accelerator, output, stop_at, goes_on=recipe.run.on_full_disk == "go_on")
    if resume is None and any(task.distills_logits):
        tracker.log("teacher", 0, task.evaluate_teachers())
    task.warn_of_poor_teachers(tracker)
    loop = Loop(
        total_steps=stop_at,
        accumulation_steps=task.accumulation_steps,
        images_per_step=task.train_loader.global_batch_size,
        clip_grad=recipe.optim.clip_grad,
        log_every_steps=recipe.run.log_every_steps,
        eval_every_epochs=recipe.run.eval_every_epochs,
        save_every_steps=task.steps_per_epoch if recipe.run.save_every_steps == "epoch" else recipe.run.save_every_steps,
        keep_checkpoints=recipe.run.keep_checkpoints,
        on_full_disk=recipe.run.on_full_disk,
        reads_every_step=sharded or accelerator.device.type == "cpu",
    )
    schedule = optim.build_schedule(recipe, task.steps_per_epoch)
    best = Best(accelerator, task.student, ema, task.holdout_loader is not None) if recipe.run.keep_best else None
    complete = fit(task, accelerator, optimizer, schedule, loop, tracker, output, ema, resume, best)
    if accelerated.compiled and not tracker.lines("compiled"):
        tracker.log("compiled", stop_at, acceleration.compiled_graphs())
    if complete:
        outcome.write(task, output, ema, best, sources[0].class_names, tracker)
    tracker.close()
    return complete


def listen() -> None:
    """Before training, where nothing is to be saved, and after it, where everything is, a signal ends the run for another start."""
    for number in heard():
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: sys.exit(REQUEUE))


if __name__ == "__main__":
    listen()
    main()
