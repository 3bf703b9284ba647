"""Whether a run may use a folder: one that is empty or holds a run of this project, so that no files of others are touched."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.files import documents
from deit_kd.files.atomic import must_be_utf8
from deit_kd.files.outputs import must_not_be_data
from deit_kd.text import for_terminal
from deit_kd.training import checkpoint, run_files

FILES, FOLDERS = ("run.json", "recipe.yaml", "metrics.jsonl"), ("checkpoints", "plots")


def must_be_ours(real: Path, output: Path, data: Path | None) -> None:
    """Refuses a folder that holds files of others, or lies in the data.

    Args:
        real: the folder, links followed.
        output: as the user gave it.
        data: the folder of the data.

    Raises:
        UserError: the folder is refused.
    """
    if output.parts[:1] and output.parts[0].startswith("~"):
        raise UserError(f"--output {output}: the shell did not replace the ~; write --output with a space behind it, or $HOME")
    must_be_utf8(real, f"--output {output}")
    if real.exists() and not real.is_dir():
        raise UserError(f"--output {output}: is a file; check the path, or give another --output")
    must_not_be_data(output, data)
    if not real.is_dir() or is_empty(real):
        return
    if not _is_known_run(real):
        if holds_a_student(real) and _is_student(real):
            raise UserError(f"--output {output}: is an exported student; give the folder of a run, or another --output")
        if not _is_likely_run(real):
            names = ", ".join(sorted(path.name for path in real.iterdir())[:3])
            raise UserError(
                f"--output {output}: holds {for_terminal(names)[:200]} ..., which train.py did not make; give another --output"
            )
    student = real / "student"
    if os.path.lexists(student) and not _is_student(student):
        raise UserError(f"--output {output}: holds a student/ that train.py did not make; move it away, or give another --output")


def must_be_of_files(real: Path, output: Path) -> None:
    """Refuses a run's folder in which a file has the name of one of its folders, or the other way round.

    Raises:
        UserError: there is one.
    """
    for name in (*FILES, *FOLDERS):
        path = real / name
        right = path.is_file() if name in FILES else path.is_dir()
        if os.path.lexists(path) and not right and (path.exists() or name in FOLDERS):
            kind = "regular file" if name in FILES else "folder"
            raise UserError(f"--output {output}: its {name} is no {kind}; move it away, and give the same command again")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but empty folders, and the files of a start that was killed before it wrote results."""
    left = re.compile(r"\.lock|\..+\.[0-9a-f]{8}\.tmp|class_means_[0-9a-f]{8}\.safetensors")
    return all(left.fullmatch(path.name) or _is_bare(path) for path in folder.iterdir())


def _is_bare(path: Path) -> bool:
    """Whether this is an empty folder, or one such as a disk's lost+found."""
    try:
        return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    except OSError:
        return False


def _is_known_run(folder: Path) -> bool:
    """Whether train.py made a folder, by its run.json or a checkpoint."""
    with suppress(UserError):
        if "deit_kd" in documents.read_json(folder / "run.json", dict[str, Any], ""):
            return True
    for path in (folder / "checkpoints").glob("step_*"):
        with suppress(UserError):
            checkpoint.read_state(path)
            return True
    return False


def _is_likely_run(folder: Path) -> bool:
    """Whether a folder without those holds a recipe of ours, and beside it only files that are ours too, or a part of ours."""
    if not _is_recipe(folder / "recipe.yaml") or not any((folder / name).is_file() for name in ("run.json", "metrics.jsonl")):
        return False
    try:
        return run_files.are_ours(run_files.read_lines(folder / "metrics.jsonl")) and not _says_something_else(folder / "run.json")
    except UserError:
        return False


def _is_recipe(file: Path) -> bool:
    with suppress(UserError):
        return file.is_file() and recipes.load(file) is not None
    return False


def _says_something_else(file: Path) -> bool:
    """Whether a JSON file is whole; one that is missing or was cut says nothing."""
    with suppress(UserError):
        documents.read_json(file, dict[str, Any], "")
        return True
    return False


def holds_a_student(folder: Path) -> bool:
    """Whether weights were exported there."""
    return (folder / "model.safetensors").is_file()


def _is_student(folder: Path) -> bool:
    """Whether train.py wrote a student there, whole or in part: by its config.json, or if that is lost by our recipe or card."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    with suppress(UserError):
        return "deit_kd" in documents.read_json(folder / "config.json", dict[str, Any], "")
    return holds_a_student(folder) and (_is_recipe(folder / "recipe.yaml") or _is_card(folder / "README.md"))


def _is_card(file: Path) -> bool:
    """Whether a README is a card of this project."""
    with suppress(UserError):
        return re.search(rb"deit[_-]kd", documents.read_bytes(file, "", documents.MEGABYTE)) is not None
    return False
