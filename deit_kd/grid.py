"""A grid of runs: the product of overrides, each a run of train.py in a folder of its own; a table and a plot of what they reached.

Runs that are complete are not run again and interrupted ones go on, so that a grid can be stopped, extended by values of its axes, and
worked on by several processes at once: a run that another process holds is left to it.
"""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.text import for_code, for_csv, for_markdown, for_terminal, lines_for_terminal, redact, redact_words
from deit_kd.tracking import read_metrics

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
Cell = dict[str, str]  # key -> value, as they are written on the command line


def run_grid(recipe: str, overrides: Sequence[str], output: Path, data: Path | None, jobs: int) -> Path:
    """Runs what is not complete, then writes grid.csv, grid.md and grid.png; returns the table.

    Args:
        recipe: a name or path.
        overrides: `key=value` for all runs, `key=value,value` for an axis; the key `seed` is what means are taken over.
        output: a folder a run is made in it.
        data: the folder of the data.
        jobs: runs at a time.

    Raises:
        UserError: a combination that the recipe refuses, or a run that failed.
    """
    cells = _cells(overrides)
    faults: dict[str, str] = {}  # the first combination that has it
    for cell in cells:
        try:
            _refuse_another(output / _name(cell, cells), recipes.load(recipe, [f"{key}={value}" for key, value in cell.items()]))
        except recipes.RecipeError as error:
            faults.setdefault(str(error), _name(cell, cells))
    if faults:
        raise UserError("\n  ".join(f"{name}: {fault}" for fault, name in faults.items()))
    output.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not _complete(output / _name(cell, cells))]
    print(f"{len(cells)} runs in {for_terminal(output)}, {len(cells) - len(todo)} of them complete", flush=True)
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def work(cell: Cell) -> str | None:
        folder = output / _name(cell, cells)
        with _held(folder.with_name(f"{folder.name}.lock")) as mine:
            return _train(recipe, cell, folder, data, threads) if mine and not _complete(folder) else None

    failures = []
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            for number, failure in enumerate(tqdm(pool.map(work, todo), "runs", len(todo), disable=None), 1):
                told = failure or f"{_name(todo[number - 1], cells)} is complete ({number} of {len(todo)})"
                tqdm.write(for_terminal(told), file=sys.stderr)
                failures += [failure] if failure else []
        except KeyboardInterrupt:  # the runs got the signal too, save and end
            pool.shutdown(cancel_futures=True)
            raise
    table = _write(recipe, overrides, cells, output)
    if failures:
        raise UserError(f"{len(failures)} of {len(todo)} runs failed, the first: {failures[0]}")
    return table


def _cells(overrides: Sequence[str]) -> list[Cell]:
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, values = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is no axis of a grid; write key=value,value, for example distill.power=1,2,4")
        axes[key] = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]  # not at the commas of a list
        if len(set(axes[key])) < len(axes[key]):
            raise UserError(f"{override!r} names a value twice; each combination is run once")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _name(cell: Cell, cells: Sequence[Cell]) -> str:
    """The folder of a run: the axes, or everything that is stated when there is none."""
    varied = [key for key in cell if len({other[key] for other in cells}) > 1] or list(cell)
    return re.sub(r"[^\w=.,+-]", "_", ",".join(f"{key.rpartition('.')[2]}={cell[key]}" for key in varied)) or "run"


def _refuse_another(folder: Path, recipe: recipes.Recipe) -> None:
    stored = folder / "recipe.yaml"
    if stored.exists() and (changed := recipes.differences(recipes.load(stored), recipe)):
        raise UserError(f"{folder}: holds a run of another recipe ({'; '.join(changed[:5])}); give another --output")


def _complete(folder: Path) -> bool:
    return (folder / "student" / "README.md").exists()


@contextmanager
def _held(file: Path) -> Iterator[bool]:
    """Whether this process got the lock; the system frees it when its holder dies."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _train(recipe: str, cell: Cell, folder: Path, data: Path | None, threads: dict[str, str]) -> str | None:
    """One run; returns what went wrong, if anything."""
    command = [sys.executable, str(TRAIN), "--recipe", recipe, "--output", str(folder), *(f"{k}={v}" for k, v in cell.items())]
    command += ["--data", str(data)] if data else []
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as stream:
        started = time.time()
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **threads}, check=False)
        stream.write(f"exit code {done.returncode} after {time.time() - started:.0f} s\n")
    if done.returncode == 0:
        return None
    lines = log.read_text().splitlines()
    said = next(
        (line for line in reversed(lines) if line.startswith("error:")), lines[-2] if len(lines) > 1 else "nothing was said"
    )
    return f"{folder.name}: {said} (all of it in {log})"


def _write(recipe: str, overrides: Sequence[str], cells: Sequence[Cell], output: Path) -> Path:
    """Mean, standard error and number of runs of each combination over seeds, of complete runs; and the first projector's rank."""
    axes = [key for key in cells[0] if key != "seed" and len({cell[key] for cell in cells}) > 1]
    scores: dict[tuple[str, ...], list[float]] = {}
    ranks: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        folder, key = output / _name(cell, cells), tuple(cell[axis] for axis in axes)
        row, rank = scores.setdefault(key, []), ranks.setdefault(key, [])
        if _complete(folder):
            metrics = read_metrics(folder)
            row.append([line for line in metrics if line["kind"] == "eval"][-1]["top1"])
            rank += [line["effective_rank"] for line in metrics if "effective_rank" in line][-1:]
    header: list[Any] = [*axes, "top1", "standard_error", "n", "projector_effective_rank"]
    rows: list[list[Any]] = [
        [*key, f"{mean(row):.2f}" if row else "", f"{_error(row):.2f}" if len(row) > 1 else "", len(row)]
        + [f"{mean(ranks[key]):.1f}" if ranks[key] else ""]
        for key, row in scores.items()
    ]
    with (output / "grid.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([[for_csv(redact(str(cell))) for cell in row] for row in (header, *rows)])
    shown = [
        [for_markdown(redact(str(cell))) if number < len(axes) else str(cell) for number, cell in enumerate(row)] for row in rows
    ]
    lines = [" | ".join(map(str, row)) for row in [header, ["---"] * len(header), *shown]]
    command = for_code(shlex.join(["deit-kd", "grid", *redact_words([recipe, *overrides])]), 2000)
    table = output / "grid.md"
    facts = _facts(output, cells)
    text = "\n".join(f"| {line} |" for line in lines)
    table.write_text(f"{command}\n\nTop-1 in percent of the last weights, mean and standard error over seeds. {facts}\n\n{text}\n")
    print(lines_for_terminal(f"\n{text}\n\n{table}"))
    if axes and any(scores.values()):
        from deit_kd.analysis import plot_grid

        plot_grid(axes, scores, output / "grid.png")
        print(for_terminal(output / "grid.png"))
    return table


def _facts(output: Path, cells: Sequence[Cell]) -> str:
    """What the complete runs have in common: data, hardware, commit."""
    runs: list[dict[str, Any]] = [
        json.loads((output / _name(cell, cells) / "run.json").read_text())
        for cell in cells
        if _complete(output / _name(cell, cells))
    ]
    if not runs:
        return "No run is complete."
    told = {
        f"{run['data']['train_images']:,} training images ({for_markdown(run['data']['name'])}), {run['hardware']}, commit {run['commit'][:12]}"
        for run in runs
    }
    return "; ".join(sorted(told)) + "."


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / math.sqrt(len(values))
