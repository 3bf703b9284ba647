"""A grid of runs: one run of train.py for each combination of overrides, then a table and a plot of their top-1.

The same command skips complete runs and resumes interrupted ones, so that a grid can be stopped and its axes extended. Several processes can work on
one grid: each skips the runs that another holds, and waits for them before it writes the table. A run inherits its lock, so that nobody starts it a second
time while it outlives a killed grid.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
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
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from threading import Event
from typing import Any

from tqdm import tqdm

from deit_kd import recipe as recipes
from deit_kd.data.workers import cores
from deit_kd.errors import UserError
from deit_kd.files.atomic import clear, write_text
from deit_kd.files.documents import Document, read_json
from deit_kd.files.locks import open_lock
from deit_kd.files.outputs import must_not_be_data
from deit_kd.files.warn import optional, warn
from deit_kd.text import for_code, for_csv, for_markdown, for_terminal, hide_secrets, lines_for_terminal, redact, redact_words
from deit_kd.training.best import exported
from deit_kd.training.metrics import read_metrics

TITLE = "`deit-kd grid "  # how grid.md begins
HELD = "another process runs it"
MOST_BYTES = 240  # of a folder's name; its log and its lock have endings
TRAIN = Path(__file__).resolve().parent.parent / "train.py"
Cell = dict[str, str]  # key -> value, as they are written on the command line


def run_grid(
    recipe: str, overrides: Sequence[str], output: Path, data: Path | None, jobs: int, imports: Sequence[Path] = ()
) -> Path:
    """Runs what is not complete, then writes grid.csv, grid.md and grid.png; returns the table.

    Args:
        recipe: a name or path.
        overrides: `key=value` for all runs, `key=value,value` for an axis; the key `seed` is what means are taken over.
        output: the folder that gets a folder for each run.
        data: the folder of the data.
        jobs: runs at a time.
        imports: Python files that each run imports.

    Raises:
        UserError: a combination that the recipe refuses, or a run that failed.
    """
    must_not_be_data(output, data)
    cells = _cells(overrides)
    faults: dict[str, str] = {}  # the first combination that has it
    for cell in cells:
        try:
            loaded = recipes.load(recipe, [f"{key}={value}" for key, value in cell.items()])
            stored = output / _name(cell, cells) / "recipe.yaml"
            changed = recipes.differences(recipes.load(stored), loaded) if stored.exists() else []
        except recipes.RecipeError as error:
            faults.setdefault(str(error), _name(cell, cells))
            continue
        if changed:
            raise UserError(f"{stored.parent}: holds a run of another recipe ({'; '.join(changed[:5])}); give another --output")
    if faults:
        raise UserError("\n  ".join(f"{name}: {fault}" for fault, name in faults.items()))
    _refuse_foreign(output, [_name(cell, cells) for cell in cells])
    output.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not _complete(output / _name(cell, cells))]
    print(f"{len(cells)} runs in {for_terminal(output)}, {len(cells) - len(todo)} of them complete", flush=True)
    failures = _run(recipe, cells, todo, output, data, jobs, imports)
    with _held(output / ".tables.lock", Event()):
        clear(output)
        table = _write(recipe, overrides, cells, output, data)
    if failures:
        raise UserError(f"{len(failures)} of {len(todo)} runs failed, the first: {failures[0]}")
    return table


def _run(
    recipe: str,
    cells: Sequence[Cell],
    todo: Sequence[Cell],
    output: Path,
    data: Path | None,
    jobs: int,
    imports: Sequence[Path],
) -> list[str]:
    """Runs these cells, those that other processes hold last; returns a line for each that failed."""
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    interrupted, failures = Event(), []

    def work(cell: Cell, waits: bool) -> str | None:
        folder = output / _name(cell, cells)
        with _held(folder.with_name(f"{folder.name}.lock"), interrupted if waits else None) as lock:
            if lock is None or _complete(folder):
                return HELD if lock is None else None
            return _train(recipe, cell, folder, data, threads, lock, imports)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            for waits in (False, True):
                held = []
                found = pool.map(partial(work, waits=waits), todo)
                for number, (cell, said) in enumerate(zip(todo, tqdm(found, "runs", len(todo), disable=None), strict=True), 1):
                    name = _name(cell, cells)
                    if said == HELD:
                        held.append(cell)
                        tqdm.write(for_terminal(f"{name}: another process runs it"), file=sys.stderr)
                        continue
                    tqdm.write(for_terminal(said or f"{name} is complete ({number} of {len(todo)})"), file=sys.stderr)
                    failures += [said] if said else []
                if not held:
                    break
                todo = held
                others = f"{len(held)} run{'s' if held[1:] else ''} of another process"
                print(f"waiting for {others}, {', '.join(_name(cell, cells) for cell in held[:3])}", file=sys.stderr, flush=True)
        except BaseException:  # after Ctrl-C; the runs got the signal too, save and end
            interrupted.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


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
    """The folder of a run, named after the axes, or after all overrides if there is no axis. Names differ and hold no secret."""
    return _names(tuple(tuple(each.items()) for each in cells))[tuple(cell.items())]


@lru_cache(maxsize=4)
def _names(cells: tuple[tuple[tuple[str, str], ...], ...]) -> dict[tuple[tuple[str, str], ...], str]:
    values: dict[str, set[str]] = {}
    for cell in cells:
        for key, value in cell:
            values.setdefault(key, set()).add(value)
    varied = [key for key in values if len(values[key]) > 1] or list(values)
    public = {(key, value): _public(key, value) for key in varied for value in values[key]}
    found: dict[tuple[tuple[str, str], ...], str] = {}
    taken: set[str] = set()
    for cell in cells:
        stated = dict(cell)
        named = ",".join(f"{key.rpartition('.')[2]}={public[key, stated[key]]}" for key in varied)
        name = re.sub(r"[^\w=.,+-]", "_", named) or "run"
        if name in taken or any(public[key, stated[key]] != stated[key] for key in varied) or len(os.fsencode(name)) > MOST_BYTES:
            digest = hashlib.sha256(json.dumps([stated[key] for key in varied]).encode()).hexdigest()[
                :8
            ]  # for values that look alike
            name = f"{os.fsencode(name)[: MOST_BYTES - 9].decode(errors='ignore')}-{digest}"
        taken.add(name)
        found[cell] = name
    return found


def _public(key: str, value: str) -> str:
    """A value without passwords and tokens."""
    public = hide_secrets(f"{key}={value}").partition("=")[2]
    return public if public != value else hide_secrets(value)


def _shown(key: str, cell: Cell, cells: Sequence[Cell]) -> str:
    """`_public` for tables, with a number behind values that look alike."""
    public = _public(key, cell[key])
    alike = [value for value in dict.fromkeys(other[key] for other in cells) if _public(key, value) == public]
    return public if len(alike) == 1 else f"{public} ({alike.index(cell[key]) + 1})"


def _refuse_foreign(output: Path, names: Sequence[str]) -> None:
    """Checks the output folder.

    Raises:
        UserError: it is a run's folder, or holds files that are not a grid's.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output {output}: is no folder; give another")
    there = set(os.listdir(output)) if output.is_dir() else set()
    table = output / "grid.md"
    has_table = table.is_file() and table.read_bytes()[: len(TITLE)] == TITLE.encode()
    own = {".tables.lock", *(f"{name}{end}" for name in names for end in ("", ".lock", ".log"))}
    foreign = {"grid.csv", "grid.md", "grid.png"} & there if not has_table else set()
    foreign |= {"run.json", "recipe.yaml", "metrics.jsonl", "checkpoints"} & there  # of a run
    if there - own and not has_table and not any((output / name / "recipe.yaml").is_file() for name in there):
        foreign = there - own
    if foreign:
        found = for_terminal(", ".join(sorted(foreign)[:3]))[:200]
        raise UserError(f"--output {output}: holds {found}, which deit-kd grid did not make; give another --output")


def _complete(folder: Path) -> bool:
    card = folder / "student" / "README.md"
    return card.is_file() and card.stat().st_size > 0


@contextmanager
def _held(file: Path, interrupted: Event | None) -> Iterator[int | None]:
    """Holds a lock in the block and gives its descriptor. The system frees the lock when all processes with the descriptor have ended.

    Args:
        file: made if it is missing.
        interrupted: wait for the lock until this is set. Without it: give None if another process holds the lock.
    """
    with open_lock(file) as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if interrupted is None or interrupted.wait(0.2):
                    yield None
                    return
                continue
            except OSError as error:
                warn(f"{file.parent}: this disk has no locks ({error.strerror}); make sure that no other grid runs there")
            yield stream.fileno()
            return


def _train(
    recipe: str, cell: Cell, folder: Path, data: Path | None, threads: dict[str, str], lock: int, imports: Sequence[Path]
) -> str | None:
    """One run, which inherits the lock; returns a line if it failed."""
    command = [sys.executable, str(TRAIN), "--recipe", recipe, "--output", str(folder), *(f"{k}={v}" for k, v in cell.items())]
    command += ["--data", str(data)] if data else []
    command += [word for file in imports for word in ("--import", str(file))]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as stream:
        started = time.monotonic()
        settings: dict[str, Any] = {"env": {**os.environ, **threads}, "pass_fds": (lock,)}
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, **settings)
        stream.write(f"exit code {done.returncode} after {time.monotonic() - started:.0f} s\n")
    if done.returncode == 0:
        return None
    lines = log.read_text(errors="replace").splitlines()
    said = next(
        (line for line in reversed(lines) if line.startswith("error:")), lines[-2] if len(lines) > 1 else "nothing was said"
    )
    return for_terminal(f"{folder.name}: {said} (all of it in {log})")


def _write(recipe: str, overrides: Sequence[str], cells: Sequence[Cell], output: Path, data: Path | None) -> Path:
    """Writes the tables: over the seeds of each combination's complete runs, mean, standard error and number; the first projector's rank."""
    axes = [key for key in cells[0] if key != "seed" and len({cell[key] for cell in cells}) > 1]
    scores: dict[tuple[str, ...], list[float]] = {}
    chosen: set[str] = set()
    kinds: dict[tuple[str, ...], set[str]] = {}
    ranks: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        folder, key = output / _name(cell, cells), tuple(_shown(axis, cell, cells) for axis in axes)
        row, rank = scores.setdefault(key, []), ranks.setdefault(key, [])
        if _complete(folder):
            metrics = read_metrics(folder)
            of_these, how = exported(metrics, read_json(folder / "run.json", dict[str, Any], "run it again in another folder"))
            row += [of_these["top1"]] if of_these else []
            chosen |= {how} if how else set()
            kinds.setdefault(key, set()).add("best" if how else "last")
            rank += [line["effective_rank"] for line in metrics if "effective_rank" in line][-1:]
    header: list[Any] = [*axes, "top1", "standard_error", "n", "projector_effective_rank", "weights"]
    rows: list[list[Any]] = [
        [*key, f"{mean(row):.2f}" if row else "", f"{_error(row):.2f}" if len(row) > 1 else "", len(row)]
        + [f"{mean(ranks[key]):.1f}" if ranks[key] else "", " and ".join(sorted(kinds.get(key, ())))]
        for key, row in scores.items()
    ]
    shown = [
        [for_markdown(redact(str(cell))) if number < len(axes) else str(cell) for number, cell in enumerate(row)] for row in rows
    ]
    lines = [" | ".join(map(str, row)) for row in [header, ["---"] * len(header), *shown]]
    folders = [*(["--data", "DATA"] if data else []), "--output", output.name or "OUTPUT"]
    command = for_code(shlex.join(["deit-kd", "grid", *redact_words([recipe, *overrides, *folders])]), 2000)
    table, text = output / "grid.md", "\n".join(f"| {line} |" for line in lines)
    weights = f"weights that run.keep_best kept, {' or '.join(sorted(chosen))}" if chosen else "last weights"
    about = f"Top-1 in percent of the {weights}, mean and standard error over seeds. {_facts(output, cells)}"
    write_text(table, f"{command}\n\n{about}\n\n{text}\n")  # first: the others are known by it
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([[for_csv(redact(str(cell))) for cell in row] for row in (header, *rows)])
    write_text(output / "grid.csv", stream.getvalue())
    print(lines_for_terminal(f"\n{text}\n\n{table}"))
    if axes and any(scores.values()):
        from deit_kd.plots import plot_grid

        with optional(f"writing {output / 'grid.png'}"):
            plot_grid(axes, scores, output / "grid.png")
        print(for_terminal(output / "grid.png"))
    return table


class _Data(Document):
    train_images: int
    name: str


class _Run(Document):
    """The part of run.json that a table shows."""

    data: _Data
    hardware: str
    commit: str


def _facts(output: Path, cells: Sequence[Cell]) -> str:
    """What the complete runs have in common: data, hardware, commit."""
    folders = [folder for cell in cells if _complete(folder := output / _name(cell, cells))]
    runs = [read_json(folder / "run.json", _Run, "run it again in another folder") for folder in folders]
    if not runs:
        return "No run is complete."
    facts = {
        f"{run.data.train_images:,} training images ({run.data.name}), {run.hardware}, commit {run.commit[:12]}" for run in runs
    }
    return for_markdown(redact("; ".join(sorted(facts)))) + "."


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / math.sqrt(len(values))
