"""Folders of pictures that others made: which files are pictures, what is left out, and the order of classes.

As torchvision reads ROOT/CLASS/..., but for hidden and system files, links that lead back, and classes that are all numbers.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from deit_kd.data.decode import SUFFIXES
from deit_kd.errors import UserError
from deit_kd.files.documents import check, read_bytes, short
from deit_kd.text import for_terminal

# What Macs, Windows, disk stations and editors put beside pictures; names that begin with a dot go without saying.
_SYSTEM = frozenset(
    ("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "ehthumbs.db",
     "desktop.ini", "icon\r")
)  # fmt: skip
_MOST_FOLLOWED = 100  # times that links may lead to one folder
HIDDEN = "hidden or system"
CLASS_ORDER = "class_order.json"  # beside train/: the list of the folders' names, or {name: index}, where their order is another


class Found(NamedTuple):
    """The pictures below a folder, sorted, and how many files and folders of which kind are left out."""

    paths: list[str]
    left_out: Counter[str]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or the system's."""
    return name.startswith(".") or name.lower() in _SYSTEM


def readable_name(name: str) -> str:
    r"""A file's name as text; bytes that are not UTF-8 become \xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{for_terminal(str(folder))}: the folder cannot be read ({error.strerror or error}); change its permissions, or remove it"
        ) from None


def class_folders(root: Path) -> tuple[list[str], Counter[str]]:
    """(names of the folders that are classes in the order of labels, what else lies there).

    Raises:
        UserError: `root` cannot be read.
    """
    names, left_out, here = [], Counter[str](), os.path.realpath(root)
    for entry in scan(root):
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif _kind(entry) != "folder":
            left_out["beside the class folders"] += 1
        elif entry.is_symlink() and _holds(os.path.realpath(entry.path), here):
            left_out["links that lead back"] += 1
        else:
            names.append(entry.name)
    return ordered(names), left_out


def ordered(names: Iterable[str]) -> list[str]:
    """The order of labels: by value where every name is a number, as timm has it (0, 1, 2, 10), else by text, as torchvision has it."""
    found = sorted(names)
    return sorted(found, key=int) if all(name.isascii() and name.isdigit() and len(name) < 100 for name in found) else found


def find_pictures(folder: str) -> Found:
    """Pictures of a folder, its subfolders, and folders elsewhere that links lead to; links that lead back to it are left out.

    Raises:
        UserError: a folder cannot be read, or links lead to one folder over and over.
    """
    paths: list[str] = []
    left_out, followed = Counter[str](), Counter[str]()
    todo: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while todo:
        here, came_by = todo.pop()  # came_by: what the links on the way lead to
        for entry in scan(here):
            if is_hidden(entry.name):
                left_out[HIDDEN] += 1
            elif (kind := _kind(entry)) == "folder":
                target = os.path.realpath(entry.path) if entry.is_symlink() else None
                if target is not None and any(_holds(target, one) or _holds(one, target) for one in came_by):
                    left_out["links that lead back"] += 1
                    continue
                followed[target or ""] += target is not None
                if target and followed[target] > _MOST_FOLLOWED:
                    raise UserError(
                        f"{for_terminal(entry.path)}: links lead there over {_MOST_FOLLOWED} times; remove some of them"
                    )
                todo.append((entry.path, came_by if target is None else (*came_by, target)))
            elif kind == "other":
                left_out["no regular file"] += 1  # reading a FIFO or a device may wait for ever
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in SUFFIXES:
                paths.append(entry.path)
            else:
                left_out[suffix if 1 < len(suffix) <= 12 else "without a suffix"] += 1
    return Found(sorted(paths), left_out)


def in_words(left_out: Counter[str]) -> str:
    """What is left out, as `3 .heic, 1 hidden or system`; empty for none."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    some = [f"{count:,} {for_terminal(kind)}" for kind, count in kinds[:6] if count]
    rest = sum(count for _, count in kinds[6:])
    return ", ".join([*some, f"{rest:,} of other kinds"] if rest else some)


def remarks(root: Path, classes: dict[str, list[str]]) -> list[str]:
    """Warnings of what a user may not expect of a folder's classes.

    Args:
        root: for messages.
        classes: name of the folder -> its pictures.

    Raises:
        UserError: the classes lie a level deeper, or two names look alike.
    """
    found, nested = [], dict[str, list[str]]()
    for name, paths in classes.items():
        parts = [path[len(os.path.join(root, name)) + 1 :].split(os.sep, 1) for path in paths]
        if not (below := sorted({part[0] for part in parts if len(part) > 1})):
            continue
        nested[name] = below
        if len(classes) == 1 and len(below) > 1 and all(len(part) > 1 for part in parts):
            raise UserError(
                f"{for_terminal(str(root))}: holds one folder, {for_terminal(name)}, and the classes seem to lie in it "
                f"({for_terminal(', '.join(below[:3]))}); move them up to {for_terminal(str(root))}/CLASS"
            )
    if nested:
        name, folders = next(iter(nested.items()))
        place = for_terminal(f"{name}/{folders[0]}")
        found.append(
            f"pictures in subfolders, as in {place}, are of class {for_terminal(name)}, as torchvision has it; timm would name a class "
            f"after {for_terminal(folders[0])}"
        )
    for what, change in (("in how accents are encoded", _composed), ("in capital letters", str.casefold)):
        for first, second in _alike(list(classes), change):
            text = f"{for_terminal(first)!r} and {for_terminal(second)!r} are two classes that differ {what} alone"
            if change is _composed:
                raise UserError(f"{for_terminal(str(root))}: {text}; make one of them")
            found.append(text)
    return found


def same_name(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that is this name, though accents may be encoded otherwise (Macs decompose them)."""
    return name if name in known else next((each for each in known if _composed(each) == _composed(name)), None)


def read_class_names(file: Path) -> tuple[str, ...]:
    """A JSON list of class names, or a mapping {name: index}, in the order of labels.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    remedy = 'it holds the list of class names, ["cat", "dog"], or {"cat": 0, "dog": 1}'
    content = read_bytes(file, remedy, 16_000_000)
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); {remedy}") from None
    if isinstance(found, dict):
        indices = check(found, str(file), dict[str, int], remedy)
        if sorted(indices.values()) != list(range(len(indices))):
            raise UserError(f"{file}: the indices are not 0 to {len(indices) - 1}, each once; {remedy}")
        found = sorted(indices, key=indices.__getitem__)
    names = check(found, str(file), list[str], remedy)
    if not names or len(set(names)) != len(names) or "" in names:
        twice = next((name for name, count in Counter(names).items() if count > 1), "")
        raise UserError(f"{file}: {short(twice) + ' is there twice' if twice else 'a name is empty, or there is none'}; {remedy}")
    return tuple(names)


def other_order(names: Sequence[str]) -> list[str] | None:
    """The order that timm gives to folders which are sorted as text here, or the other way round; None where there is no difference."""
    from timm.utils import natural_key

    orders = [sorted(names), ordered(names), sorted(names, key=natural_key)]
    return next((order for order in orders if order != list(names)), None) if list(names) in orders else None


def order_in_doubt(who: str, names: Sequence[str]) -> str | None:
    """A warning if a network without class names may have its classes in another order than the data.

    Args:
        who: the network, as `teacher NAME`.
        names: of the data's classes.

    Returns:
        A line with the remedy; None where other code sorts them in the same order.
    """
    theirs = other_order(names)
    if theirs is None:
        return None
    place = next(n for n, (ours, other) in enumerate(zip(names, theirs, strict=True)) if ours != other)
    return (
        f"{who} does not name its classes: its logit {place} is taken for {names[place]}; a network that was trained with other code "
        f"may mean {theirs[place]}: write its order to {CLASS_ORDER} beside train/, or label_names to its config"
    )


def _kind(entry: os.DirEntry[str]) -> str:
    """File (also a link that leads nowhere: reading it says so), folder, or other."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "other"
    except OSError:  # links in a circle
        return "file"


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _alike(names: Sequence[str], change: Callable[[str], str]) -> list[tuple[str, str]]:
    first: dict[str, str] = {}
    return [(first[key], name) for name in names if first.setdefault(key := change(name), name) != name]
