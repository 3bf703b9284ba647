"""Files that are there whole or not at all, also after a power cut; locks; hashes.

Everything that the package writes goes through here: a temporary file beside the final one, flushed, renamed, its folder flushed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deit_kd.errors import UserError

Tensors = Mapping[str, Tensor]
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk that is full, or a user's share of it
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EROFS)  # a disk that has no such operation
_warned: set[str] = set()


def warn(text: str) -> None:
    """Prints a line to stderr, the same line once; where nobody reads it any more, it is dropped."""
    if text in _warned:
        return
    _warned.add(text)
    with suppress(OSError, ValueError):  # a closed stream
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def optional(what: str, warn: Callable[[str], None] = warn) -> Iterator[None]:
    """A step beside a write that may fail: an OSError becomes one warning, and the program goes on.

    Args:
        what: the step and its path, for the warning.
        warn: takes the line.
    """
    try:
        yield
    except OSError as error:
        warn(f"{what}: {error.strerror or error}; the program goes on without it")


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all; a file that already holds it is left alone.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    write_bytes(file, text.encode("utf-8", "backslashreplace"))


def write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    """`write_text` of JSON."""
    write_text(file, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_bytes(file: Path, content: bytes) -> None:
    """Writes bytes whole or not at all; a file that already holds them is left alone.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    if file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return
    with whole(file) as part:
        part.write_bytes(content)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives the path of a temporary file to write; when the block ends, it is flushed and renamed to `file`.

    Raises:
        OSError: as the block, or the disk is full; `file` is as it was.
    """
    part = _temporary(file)
    try:
        yield part
        flush(part)
        part.replace(file)
    except BaseException:
        with optional(f"removing {part}"):
            part.unlink(missing_ok=True)
        raise
    flush(file.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty temporary folder to fill; when the block ends, all in it is flushed and it is renamed to `folder`.

    What `folder` was before is removed only after that.

    Raises:
        OSError: as the block, or the disk is full; `folder` is as it was.
    """
    part = _temporary(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for path in sorted(part.rglob("*")):
            flush(path)
        flush(part)
        replace_folder(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    flush(folder.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Renames `temporary` to `final`; what was there before goes only after that."""
    before = final.with_name(f".{final.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    temporary.rename(final)
    shutil.rmtree(before, ignore_errors=True)


def write_tensors(tensors: Tensors, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all.

    Tensors are copied, because safetensors takes neither views nor channels_last memory.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    with whole(file) as part:
        try:
            save_file(copies, part, metadata or {"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        with optional(f"changing the mode of {file}"):
            part.chmod(_new_file_mode())  # safetensors makes files that only their owner can read


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk. A folder that cannot be flushed, as on some network disks, is one warning.

    Raises:
        OSError: a file cannot be written to the disk.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder and error.errno not in _CANNOT:
            raise
        warn(
            f"{path.parent}: this disk cannot flush {'folders' if is_folder else 'files'} ({error.strerror}); a power cut may lose the newest"
        )


def sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, doing: str, shown: Path | None = None) -> Iterator[None]:
    """Holds `folder/.lock` while the block runs, so that two processes never write one folder.

    Args:
        folder: it must exist.
        doing: what this process does, for the other's message.
        shown: what messages call the folder, if not by its own name.

    Raises:
        UserError: another process holds it.
    """
    file = folder / ".lock"
    with file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            other = stream.read(300).strip() or "another process"
            raise UserError(f"{shown or folder}: is in use by {other}; wait for it, stop it, or give another --output") from None
        except OSError as error:
            warn(f"{shown or folder}: this disk has no locks ({error.strerror}); make sure that no other process writes there")
        with optional(f"writing {file}"):
            stream.truncate(0)
            stream.write(f"{doing} (process {os.getpid()} on {socket.gethostname()})\n")
            stream.flush()
        yield


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _new_file_mode() -> int:
    """The mode that the user's umask gives to new files."""
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    return 0o666 & ~umask
