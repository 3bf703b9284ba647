"""Where a command puts what it makes: it touches nothing of others, and does its work once, however often it is interrupted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deit_kd.errors import UserError
from deit_kd.files.atomic import clear, flush, must_be_utf8
from deit_kd.files.locks import lock_text, locked
from deit_kd.files.warn import optional
from deit_kd.text import for_terminal

BLOCK = 1 << 20
SPLITS = ("train", "val", "validation", "test")


@contextmanager
def workspace(output: Path, doing: str) -> Iterator[Path]:
    """Gives a path beside `output` at which to make it, for `settle`; nobody else makes `output` meanwhile.

    What an interrupted command left there is removed first, and all that is left there at the end.

    Args:
        output: the file or folder that is to be made.
        doing: the command, for another process's message.

    Raises:
        UserError: another process makes it, or the path beside it is of others.
    """
    output = Path(os.path.abspath(output))
    if not output.name:
        raise UserError(f"{output}: is no name of a file or folder; give another")
    must_be_utf8(output, str(output))
    room = output.with_name(f".{output.name}.tmp")
    if os.path.lexists(room) and not _is_room(room, output):
        raise UserError(
            f"{room}: is of another program, and {output.name} would be made there; move it away, or give another --output"
        )
    room.mkdir(parents=True, exist_ok=True)
    with locked(room, doing, shown=output):
        _empty(room)
        try:
            yield room / output.name
        finally:
            with optional(f"removing {room}"):
                _empty(room)
                (room / ".lock").unlink()  # last: by it the room is known
                room.rmdir()


def _is_room(room: Path, output: Path) -> bool:
    """Whether a `workspace` made this folder, or nobody keeps anything in it: by its lock file, and the names in it."""
    if room.is_symlink() or not room.is_dir():
        return False
    names = set(os.listdir(room)) - {".lock"}
    ours = all(name == ".before" or name.startswith((output.name, f".{output.name[:60]}.")) for name in names)
    return not names and not os.path.lexists(room / ".lock") or ours and lock_text(room / ".lock") is not None


def _empty(room: Path) -> None:
    for left in room.iterdir():
        if left.name != ".lock":
            _remove(left)


def must_not_be_data(output: Path, data: Path | None, *, all_of_it: bool = False) -> None:
    """Refuses an output among the images that a command reads: its pictures and folders would be taken for data.

    Args:
        output: the file or folder that is to be made; it need not be there.
        data: the folder of the data, if there is one.
        all_of_it: where it has no folders of splits, its own folders are the classes.

    Raises:
        UserError: it is such a place.
    """
    if data is None:
        return
    real, root = Path(os.path.realpath(output)), Path(os.path.realpath(data))
    places = [Path(os.path.realpath(data / name)) for name in SPLITS]  # which may be links
    if all_of_it and not any(place.is_dir() for place in places):
        places = [root]
    if real == root or any(real.is_relative_to(place) for place in places):
        raise UserError(f"--output {output}: is where the data are; give another --output")


def settle(made: Path, output: Path) -> bool:
    """Renames what a `workspace` made to `output`, on the disk; a part of it that is there already is replaced.

    Returns:
        Whether the same was there already.

    Raises:
        UserError: something else is there; it is left alone.
    """
    fault, there = _compare(made, output), os.path.lexists(output)
    if fault:
        raise UserError(
            f"{output}: is there already, and is not what this command makes ({fault}); give another name, or remove it"
        )
    if there and not _is_shorter(made, output):
        return True
    replace(made, output)
    return False


def replace(made: Path, output: Path) -> None:
    """Flushes what a `workspace` made and renames it to `output`; what is there goes only after that."""
    for path in sorted(made.rglob("*")) if made.is_dir() else []:
        flush(path)
    flush(made)
    before = made.with_name(".before")
    if output.is_dir():
        output.rename(before)
    try:
        made.replace(output)
    except OSError:
        if before.exists():
            before.rename(output)
        raise
    flush(Path(os.path.abspath(output)).parent)


@contextmanager
def claimed(folder: Path, doing: str, is_ours: Callable[[Path], bool]) -> Iterator[None]:
    """Makes `folder` and holds its lock while the block runs.

    Args:
        folder: to be made, or filled; it may be empty.
        doing: the command.
        is_ours: whether the command made what is in a folder that is not empty.

    Raises:
        UserError: the folder holds what the command did not make, or another process is at work in it.
    """
    must_be_utf8(Path(os.path.abspath(folder)), str(folder))
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give another --output")
    names = sorted(set(os.listdir(folder)) - {".lock"}) if folder.is_dir() else []
    if names and not _began(folder, doing) and not is_ours(folder):
        found = for_terminal(", ".join(names[:3]))[:200]
        raise UserError(f"{folder}: holds {found}{' ...' if names[3:] else ''}, which {doing} did not make; give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    # a folder that would not be known as ours keeps the lock file, by which `_began` knows it
    with locked(folder, doing, stays=lambda: bool(set(os.listdir(folder)) - {".lock"}) and not is_ours(folder)):
        clear(folder)
        yield


def _began(folder: Path, doing: str) -> bool:
    """Whether this command was interrupted in `folder`: its lock file says so."""
    return (lock_text(folder / ".lock") or "").startswith(f"{doing} (process")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _compare(made: Path, there: Path) -> str | None:
    """What `there` has that `made` has not; None if it is not there, equal, or a part: files are missing, or end too early."""
    if not os.path.lexists(there):
        return None
    if not there.exists() or (there.is_symlink() and _is_shorter(made, there)):
        return "a link"
    if made.is_dir() != there.is_dir():
        return "a folder" if there.is_dir() else "a file"
    if made.is_file():
        return None if there.is_file() and _begins_with(made, there) else "a file of other content"
    for path in sorted(there.rglob("*")):
        name = path.relative_to(there)
        if not (made / name).exists():
            return f"a folder that also holds {for_terminal(str(name))}"
        if path.is_dir() and (made / name).is_dir():
            continue
        if not path.is_file() or not (made / name).is_file() or not _begins_with(made / name, path):
            return f"a folder whose {for_terminal(str(name))} has other content"
    return None


def _is_shorter(made: Path, there: Path) -> bool:
    """Whether files of `made` are missing `there`, or longer; of two that `_compare` took for each other's beginning."""
    if made.is_file() or there.is_file():
        return made.stat().st_size != there.stat().st_size
    paths = [path.relative_to(made) for path in made.rglob("*")]
    return any(
        not (there / name).exists() or ((made / name).is_file() and (made / name).stat().st_size != (there / name).stat().st_size)
        for name in paths
    )


def _begins_with(whole: Path, part: Path) -> bool:
    """Whether a file begins with all bytes of another."""
    if part.stat().st_size > whole.stat().st_size:
        return False
    with whole.open("rb") as ours, part.open("rb") as theirs:
        while block := theirs.read(BLOCK):
            if block != ours.read(len(block)):
                return False
    return True
