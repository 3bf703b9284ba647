"""The start of a run in its folder: whether the folder is ours and free, which checkpoint to go on from, and whether it still fits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from deit_kd import recipe as recipes
from deit_kd.data import Source
from deit_kd.errors import UserError
from deit_kd.files.atomic import clear, flush, make_folder
from deit_kd.files.locks import locked
from deit_kd.files.warn import optional
from deit_kd.recipe import Recipe
from deit_kd.text import redact
from deit_kd.training import checkpoint, run_files, run_place
from deit_kd.training import resume as resuming
from deit_kd.training.metrics import read_metrics

if TYPE_CHECKING:
    from deit_kd.training.task import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """How a run begins. Only the main process has more than the checkpoint.

    Attributes:
        checkpoint: to go on from; its files are whole.
        state: its state.json.
        run: run.json of the sessions before.
        accepted: keys that may have changed, as the user says.
    """

    checkpoint: Path | None
    state: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] | None = None
    accepted: tuple[str, ...] = ()


@contextmanager
def entered(
    output: Path, recipe: Recipe, resume: str, accept: str | None, data: Path | None, accelerator: Accelerator
) -> Iterator[Start]:
    """Makes the folder, holds it while the block runs, and finds the checkpoint to go on from.

    Args:
        output: the run folder.
        recipe: the resolved recipe; a folder of another one is refused.
        resume: auto, none, or the path of a checkpoint. With none an existing run is moved aside, not deleted.
        accept: keys, with commas between them, of what may have changed; see `resume.MAY_CHANGE`.
        data: the folder of the data.
        accelerator: does this on the main process and prints.

    Raises:
        UserError: the folder is not of this project, of another recipe or in use, or the checkpoint is not there.
        OSError: the folder cannot be made or moved.
    """
    with ExitStack() as held:

        def enter() -> Start:
            accepted = resuming.parse_accepted(accept)
            real = Path(os.path.realpath(output))  # a link stands for the folder that it leads to
            run_place.must_be_ours(real, output, data)
            if resume == "none" and real.is_dir() and not run_place.is_empty(real):
                _move_aside(real, output, accelerator.print)
            make_folder(real)
            held.enter_context(locked(real, "train.py", shown=output))
            for folder in (real, *(real / name for name in ("checkpoints", "student", "plots"))):
                clear(folder)
            run_place.must_be_of_files(real, output)
            return _find(output, recipe, resume, accepted, accelerator.print)

        start = on_main(accelerator, enter)
        chosen: list[Path | None] = [start.checkpoint if start else None]
        broadcast_object_list(chosen)  # one process looks for it, and all use the same
        yield start or Start(chosen[0])


def must_fit(output: Path, recipe: Recipe, resume: str, accept: str | None, data: Path | None) -> None:
    """Refuses a folder that `entered` would refuse for its content or its recipe; changes nothing there.

    Raises:
        UserError: as `entered`.
    """
    accepted, real = resuming.parse_accepted(accept), Path(os.path.realpath(output))
    run_place.must_be_ours(real, output, data)
    stored = None if resume == "none" else _stored_recipe(output, lambda _: None)
    if stored is not None:
        was = {key: value for key, value in number_keys(stored).items() if key not in resuming.OF_DATA}
        recorded = _accepted_before(_stored_run(output, lambda _: None))
        fault = f"--output {output}: holds a run of another recipe"
        resuming.refuse(fault, resuming.changes(was, number_keys(recipe)), accepted, recorded, begun=f"--recipe {output}")
    if resume not in ("auto", "none"):
        checkpoint.verify(Path(resume))


def number_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that move a number, with their values."""
    return run_files.plain({key: value for key, value in recipes.flatten(recipe) if not key.startswith("run.")})


def _move_aside(real: Path, output: Path, say: Callable[[str], None]) -> None:
    """Renames a run's folder, holding its lock."""
    stamp = real.with_name(f"{real.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    aside = next(path for n in count() if not os.path.lexists(path := stamp.with_name(f"{stamp.name}{n and f'-{n}' or ''}")))
    with locked(real, "train.py", shown=output):
        real.rename(aside)
    with optional(f"removing {aside / '.lock'}"):
        (aside / ".lock").unlink(missing_ok=True)
    flush(real.parent)
    say(f"the run that was in {output} is now in {aside}")


def _find(output: Path, recipe: Recipe, resume: str, accepted: tuple[str, ...], say: Callable[[str], None]) -> Start:
    """The start in a folder that this process holds: the checkpoint to go on from, if what the run depends on is the same."""
    stored, run = _stored_recipe(output, say), _stored_run(output, say)
    recorded = _accepted_before(run)
    now = number_keys(recipe)

    def compare(was: Mapping[str, Any], fault: str) -> None:
        found = resuming.changes({key: value for key, value in was.items() if key not in resuming.OF_DATA}, now)
        resuming.refuse(fault, found, accepted, recorded, begun=f"--recipe {output}" if stored is not None else "")

    if stored is not None:
        compare(number_keys(stored), f"--output {output}: holds a run of another recipe")

    def accepts(state: Mapping[str, Any]) -> bool:
        try:
            compare(state.get("depends_on") or {"recipe": "unknown"}, "")
        except UserError:
            return False
        return True

    folder, path = output / "checkpoints", None if resume in ("auto", "none") else Path(resume)
    fits = {recipes.fingerprint(each) for each in (recipe, stored) if each is not None}
    if path is None:
        path = checkpoint.newest(folder, say, accepts=lambda state: state.get("recipe") in fits or accepts(state))
        state = {} if path is None else checkpoint.read_state(path)
    else:
        state = checkpoint.verify(path)  # reports now what is wrong with it
        if state.get("recipe") not in fits:
            compare(state.get("depends_on") or {"recipe": "unknown"}, f"--resume {path}: is of another recipe")
    if path is None:
        worth = _of_worth(output, run)
        if worth:
            raise UserError(
                f"--output {output}: holds {worth}, but no whole checkpoint to go on from; put its checkpoints back, or "
                "begin anew with --resume none, which moves that run aside"
            )
        _drop_lines(output / "metrics.jsonl", say)
    else:
        run = run or _copied_run(path, state, say)
        say(f"going on from {path}")
    checkpoint.set_aside_after(folder, path, say)
    if path is not None and path.parent == folder:
        checkpoint.prune(folder, path, recipe.run.keep_checkpoints)  # a save that was killed may not have done it
    return Start(path, state, run, accepted)


def _of_worth(output: Path, run: Mapping[str, Any] | None) -> str | None:
    """What a new start in this folder would lose, in words; None if nothing."""
    lines = read_metrics(output)
    saved = None if run is None else run.get("saved")  # runs of earlier versions do not say
    if lines and saved is not False:
        return "what a run measured"
    if run_place.holds_a_student(output / "student"):
        return "the student of a run"
    return "a run that was saved" if saved else None


def _drop_lines(file: Path, say: Callable[[str], None]) -> None:
    """Removes the metrics.jsonl of a start that saved nothing; one that holds lines of others is renamed."""
    if not os.path.lexists(file):
        return
    if run_files.are_ours(run_files.read_lines(file)):
        file.unlink()
        return
    names = (file.with_name(f"aside_{file.name}{number and f'.{number}' or ''}") for number in count())
    aside = next(path for path in names if not os.path.lexists(path))
    file.rename(aside)
    say(f"{file} holds lines that train.py did not write; it is set aside as {aside.name}")


def _stored_recipe(output: Path, say: Callable[[str], None]) -> Recipe | None:
    """The recipe in recipe.yaml of a run; None if it is missing or damaged."""
    file = output / "recipe.yaml"
    try:
        return recipes.load(file) if os.path.lexists(file) else None
    except UserError as error:
        say(f"{file}: cannot be read ({str(error).splitlines()[0]}); a checkpoint says what the run's recipe is")
        return None


def _stored_run(output: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The content of run.json; None if it is missing or damaged."""
    try:
        return run_files.read_run(output) if os.path.lexists(output / "run.json") else None
    except UserError as error:
        say(f"{error}; a checkpoint of the run stands in for it")
        return None


def _copied_run(path: Path, state: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The copy of run.json in a checkpoint; None if there is none."""
    try:
        return run_files.parse_run(state["folder"]["run.json"], str(path / "state.json"))
    except (UserError, KeyError, TypeError):
        say(f"{path}: does not say how the run began; its card will describe only what follows")
        return None


def _accepted_before(run: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return list((run or {}).get("accepted_changes", []))


def compare_data(
    output: Path, task: Task, recipe: Recipe, sources: tuple[Source, Source], start: Start, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Stores in the task what the run depends on; refuses other data, teachers or weights than the checkpoint's.

    Returns:
        All changes that were accepted so far.

    Raises:
        UserError: a change that is not accepted.
    """
    keys, tune = number_keys(recipe), recipe.finetune
    task.depends_on = resuming.depends_on(keys, tune.weights if tune else None, sources, dict.fromkeys(task.teachers))
    recorded = _accepted_before(start.run)
    if start.checkpoint is None:
        return []
    was, now = start.state.get("depends_on"), task.depends_on
    if not was:
        say(f"{start.checkpoint}: an earlier version wrote it; whether data, classes and teacher are the same cannot be compared")
        names = sources[0].class_names
        # Earlier versions had the folders of classes in the order of their names as text.
        by_text = sorted(names) if recipe.data.source in ("image_folder", "imagenette") else names
        was = resuming.of_old(keys, start.state.get("steps_per_epoch"), by_text)
        now = resuming.of_old(keys, task.steps_per_epoch, names)
    found = resuming.changes(was, now)
    faults = [fault for source in sources for fault in resuming.unreadable(source)] if found else []
    resuming.refuse(
        f"--output {output}: a run continues only with the data, teachers and weights that it had",
        found,
        start.accepted,
        recorded,
        faults,
    )
    _must_be_reachable(start.checkpoint, start.state, recipe.epochs, task.steps_per_epoch, bool(found or recorded))
    new = [{**change, "told": redact(resuming.in_words(change)), "step": start.state["step"]} for change in found]
    for change in new:
        say(f"goes on with a change that was accepted, and is recorded in run.json: {resuming.in_words(change)}")
    return [*recorded, *(change for change in new if change not in recorded)]


def _must_be_reachable(path: Path, state: Mapping[str, Any], epochs: int, steps_per_epoch: int, changed: bool) -> None:
    """Refuses a step that the run does not have, and an epoch of other length than the same data have.

    Raises:
        UserError: the checkpoint has such a step or epoch.
    """
    then = state.get("steps_per_epoch") or steps_per_epoch
    if then != steps_per_epoch and not changed:
        raise UserError(f"{path}: says {then} steps an epoch, these data have {steps_per_epoch}; {checkpoint.REMEDY}")
    if state["step"] > epochs * then:
        raise UserError(f"{path}: says step {state['step']}, the run has {epochs * then}; {checkpoint.REMEDY}")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Calls `work` on the main process, which gets its result; if it fails, all processes raise the error."""
    answer: list[Any] = [None]
    found: T | None = None
    if accelerator.is_main_process:
        try:
            found = work()
        except (UserError, OSError) as error:
            answer = [error]
    broadcast_object_list(answer)
    if answer[0] is not None:
        raise answer[0]
    return found
