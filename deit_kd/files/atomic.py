"""Files that are there whole or not at all, also after a power cut; hashes.

Everything that the package writes goes through here: a temporary file beside the final one, flushed, renamed, its folder flushed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.files.warn import optional, warn

Tensors = Mapping[str, Tensor]
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk that is full, or a user's share of it
_NO_FLUSH = (
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EPERM,
    errno.EACCES,
    errno.EROFS,
    errno.EBADF,
)  # no such operation here
_LEFT = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)")  # what a killed write leaves


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
    """Writes bytes whole or not at all; a file that already holds them is left alone. A device or pipe just gets them.

    Raises:
        OSError: the disk is full or gone; the file is as it was.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        file.write_bytes(content)
        return
    if file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return
    with whole(file) as part:
        part.write_bytes(content)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives the path of a temporary file to write; when the block ends, it is flushed and renamed to `file`.

    The file gets the mode that the user's umask gives to new files, whatever the block made of it.

    Raises:
        OSError: as the block, or the disk is full; `file` is as it was.
    """
    part = _beside(file, "tmp")
    try:
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:  # safetensors makes files that only their owner can read
            try:
                part.chmod(mode)
            except OSError as error:
                text = f"{file.parent}: this disk cannot change modes ({error.strerror}); only you can read some files there"
                warn(text, once=f"modes of disk {part.stat().st_dev}")
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
    make_folder(folder.parent)
    part = _beside(folder, "tmp")
    try:
        part.mkdir()
        yield part
        for path in sorted(part.rglob("*")):
            flush(path)
        flush(part)
        replace_folder(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def must_be_utf8(path: Path, shown: str) -> None:
    """Refuses a path that safetensors cannot open.

    Raises:
        UserError: its name, or one above it, is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown}: is a path whose name is not UTF-8, where no tensors can be written; give another") from None


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, on the disk.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Renames `temporary`, which is flushed, to `final`; what was there before goes only after that.

    Raises:
        OSError: it cannot be renamed; `final` is as it was.
    """
    before = _beside(final, "old")
    there = final.exists()
    if there:
        final.rename(before)
    try:
        temporary.rename(final)
    except OSError:
        if there:
            before.rename(final)
        raise
    flush(final.parent)
    if there:
        with optional(f"removing {before}"):
            shutil.rmtree(before)


def clear(folder: Path) -> None:
    """Removes what killed writes left in a folder that this process alone writes; a replaced folder comes back if nothing took its place."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        left = _LEFT.fullmatch(path.name)
        if left is None:
            continue
        with optional(f"clearing {path}"):
            if left[2] == "old" and not (folder / left[1]).exists():
                path.rename(folder / left[1])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


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


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk.

    Raises:
        OSError: the disk fails, or cannot do so.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """`fsync`; a disk that cannot do so, as some network disks for folders, is one warning.

    Raises:
        OSError: a file cannot be written to the disk.
    """
    is_folder = path.is_dir()
    try:
        fsync(path)
    except OSError as error:
        if not is_folder and error.errno not in _NO_FLUSH:
            raise
        what = "folders" if is_folder else "files"
        with suppress(OSError):
            warn(
                f"{path if is_folder else path.parent}: this disk cannot flush {what} ({error.strerror}); a power cut may lose the newest",
                once=f"{what} of disk {path.stat().st_dev}",
            )


def sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _beside(path: Path, kind: str) -> Path:
    """A name beside `path` that nobody uses."""
    return path.with_name(f".{path.name if kind == 'old' else path.name[:60]}.{secrets.token_hex(4)}.{kind}")
