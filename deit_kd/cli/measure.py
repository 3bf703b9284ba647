"""Verbs that look at runs and machines: grids, doctor, plan, bench."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from deit_kd import recipe as recipes
from deit_kd.cli.command_line import bounded, recipe_options
from deit_kd.errors import UserError
from deit_kd.text import for_terminal


def _bench_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what measures")
    verb.add_argument("--device-batch-size", type=bounded(int, 1, 1_000_000), help="most images on a device at once")
    verb.add_argument("--json", type=Path, help="a file to write the numbers to")


def _write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        from deit_kd.files.atomic import write_json
        from deit_kd.files.outputs import replace, workspace

        with workspace(file, "another deit-kd") as made:
            write_json(made, content)
            replace(made, file)


def _may_write(file: Path | None, key: str) -> None:
    """Refuses a file of others before any work; one with this key is ours, of before, and so is an empty one."""
    if file is None or not os.path.lexists(file) or (file.is_file() and file.stat().st_size == 0):
        return
    from deit_kd.files.documents import read_json

    remedy = "it is left alone; give another --json"
    if key not in read_json(file, dict[str, Any], f"which this command did not write; {remedy}"):
        raise UserError(f"--json {file}: holds something that this command did not write; {remedy}")


def _add_grid(verbs: Any) -> None:
    verb = verbs.add_parser(
        "grid",
        help="every combination of overrides as a run; a table and a plot",
        epilog="example: deit-kd grid quickstart distill.power=1,2,4,5 seed=0,1,2 --output runs/power",
    )
    recipe_options(verb)
    verb.add_argument("--output", type=Path, help="the folder of the runs (default: runs/grid_RECIPE)")
    verb.add_argument("--jobs", type=bounded(int, 1, 1024), default=1, help="runs at a time, each in a process of its own")
    verb.set_defaults(run=grid)


def grid(options: argparse.Namespace) -> None:
    """Runs a grid, or the rest of it."""
    from deit_kd.sweep import run_grid

    output = options.output or Path("runs") / f"grid_{recipes.run_folder(options.recipe).name}"
    run_grid(options.recipe, options.overrides, output, options.data, options.jobs, options.imports)


def _add_doctor(verbs: Any) -> None:
    verb = verbs.add_parser(
        "doctor",
        help="what is wrong with this environment; exit code 0, 1 for a warning, 2 for a fault",
        epilog="under a launcher: torchrun --nproc_per_node 2 -m deit_kd doctor deit_ti --data DIR",
    )
    recipe_options(verb)
    verb.add_argument("--output", type=Path, help="the run folder (default: runs/RECIPE)")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.set_defaults(run=doctor)


def doctor(options: argparse.Namespace) -> None:
    """Prints a line a check; the exit code is that of the worst."""
    recipe = recipes.load(options.recipe, options.overrides)
    from deit_kd.distributed.accelerator import make_accelerator, plain_accelerator
    from deit_kd.models import build
    from deit_kd.profiling.doctor import SEVERITY, run_checks, verdict

    recipe, fault = build.resolve(recipe), None
    output = options.output or recipes.run_folder(options.recipe)
    try:
        try:
            accelerator = make_accelerator(recipe.run, recipe.optim.clip_grad, options.device, output)
        except UserError as error:
            fault = str(error)
            accelerator = plain_accelerator(cpu=options.device != "cuda")  # the rest can be looked at all the same
    except (ValueError, RuntimeError) as error:  # WORLD_SIZE without a launcher, or a launcher that nobody else answers
        reason = fault or " ".join(str(error).split())[:200]
        raise UserError(f"processes do not find each other ({reason}); start them with a command of launch/README.md") from None
    lines = []
    for line in run_checks(recipe, options.data, output, accelerator, fault):
        accelerator.print(f"{line.severity:<5} {line.name:<11} {for_terminal(line.text)}", flush=True)
        lines.append(line)
    accelerator.print(verdict(lines))
    accelerator.end_training()
    sys.exit(max(SEVERITY[line.severity] for line in lines))


def _add_plan(verbs: Any) -> None:
    verb = verbs.add_parser(
        "plan",
        help="parameters, FLOPs, memory, disk, hours on devices that need not be there; trains nothing",
        epilog="example: deit-kd plan deit_ti --gpus 8 --gpu h200",
    )
    recipe_options(verb)
    verb.add_argument(
        "--gpus", type=bounded(int, 1, 1_000_000), default=1, help="processes of a machine, each with a GPU (default: 1)"
    )
    verb.add_argument("--nodes", type=bounded(int, 1, 1_000_000), default=1, help="machines (default: 1)")
    verb.add_argument("--gpu", help="h200, h100, a100, l40s, 5090, 4090, 3090, or cpu for this machine's (default: a table of all)")
    verb.add_argument("--images", type=bounded(int, 1, 10**12), help="of an epoch, where there are no --data")
    verb.add_argument("--measure", action="store_true", help="30 steps here, beside what was predicted")
    verb.add_argument("--steps", type=bounded(int, 1, 1_000_000), default=30, help="of --measure (default: 30)")
    _bench_options(verb)
    verb.set_defaults(run=plan)


def plan(options: argparse.Namespace) -> None:
    """Prints what a recipe takes, on one device or on each of the table."""
    _may_write(options.json, "predicted")
    recipe = recipes.load(options.recipe, options.overrides)
    from deit_kd.profiling import forecast

    found = forecast.forecast(recipe, options.data, options.images, options.gpu, options.gpus, options.nodes)
    print(forecast.describe(found), flush=True)
    content = forecast.as_json(found)
    if options.measure:
        content["measured"] = forecast.measure(found, options.data, options.device, options.device_batch_size, options.steps)
        print("\n" + forecast.compare(content["measured"]))
    _write_json(options.json, content)


def _add_bench(verbs: Any) -> None:
    verb = verbs.add_parser(
        "bench",
        help="seconds of a step in data, teacher, student, communication; the bottleneck, and what to change",
        epilog="under a launcher: torchrun --nproc_per_node 2 -m deit_kd bench deit_ti --data DIR",
    )
    recipe_options(verb)
    verb.add_argument("--steps", type=bounded(int, 1, 1_000_000), default=50, help="timed in each pass (default: 50)")
    _bench_options(verb)
    verb.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> None:
    """Prints where the time goes."""
    _may_write(options.json, "advice")
    recipe = recipes.load(options.recipe, options.overrides)
    from dataclasses import asdict

    from deit_kd.profiling.advice import advise, bottleneck_of, conditions_of, describe
    from deit_kd.profiling.bench import StepBenchmark
    from deit_kd.profiling.bench import bench as run_bench

    benchmark = StepBenchmark(recipe, options.data, options.device, options.device_batch_size)
    timed = run_bench(benchmark, options.steps)
    conditions = conditions_of(benchmark)
    benchmark.accelerator.print(describe(timed, conditions))
    if benchmark.accelerator.is_main_process:
        _write_json(options.json, asdict(timed) | {"wall": bottleneck_of(timed), "advice": advise(timed, conditions)})
    benchmark.accelerator.end_training()


VERBS = (_add_grid, _add_doctor, _add_plan, _add_bench)
