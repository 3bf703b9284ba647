"""Python files of users, which register losses, projectors and students: imported by path, and recorded with their hashes."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deit_kd.errors import UserError

hashes: dict[Path, str] = {}  # of each file its sha256


def import_file(path: Path) -> None:
    """Runs a Python file, once in a process.

    Raises:
        UserError: it is missing, or raises.
    """
    file = path.resolve()
    if file in hashes:
        return
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"--import {path}: is no Python file; give the .py file that registers your losses, projectors or students")
    if file.stem in sys.modules or not file.stem.isidentifier():
        raise UserError(f"--import {path}: {file.stem} is the name of another module, or no name of one; rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    note(file)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code raises what it wants
        del sys.modules[file.stem], hashes[file]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else "?"
        reason = " ".join(str(error).split())
        if isinstance(error, UserError):
            raise UserError(f"--import {path}, line {line}: {reason}") from None
        raise UserError(f"--import {path}, line {line}: {type(error).__name__}: {reason}; mend it there") from None


def note(file: Path) -> None:
    """Records a file that registers something."""
    file = file.resolve()
    if file.is_file():
        hashes.setdefault(file, hashlib.sha256(file.read_bytes()).hexdigest())


def note_source(function: Callable[..., Any]) -> None:
    """Records the file of a function or class that is registered; one that is typed at a prompt has none."""
    with suppress(TypeError):
        note(Path(inspect.getsourcefile(function) or ""))


def file_of(module: str) -> Path | None:
    """The recorded file that a module is; None for another module."""
    place = getattr(sys.modules.get(module), "__file__", None)
    file = Path(place).resolve() if place else None
    return file if file in hashes else None


def imported() -> dict[str, str]:
    """Name -> sha256 of each file that was imported or that registered something."""
    return {file.name: digest for file, digest in sorted(hashes.items())}
