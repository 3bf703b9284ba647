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
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.text import for_terminal

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
_warned: set[str] = set()
_takers: list[Callable[[str], None]] = []  # of `collected`, the innermost last
_locks: set[IO[str]] = set()


def warn(text: str, once: str | None = None) -> None:
    """Prints a line to stderr, the same line once; where nobody reads it any more, it is dropped.

    Args:
        text: the line.
        once: lines with the same key count as the same.
    """
    if _takers:
        _takers[-1](text)
        return
    if (once or text) in _warned:
        return
    _warned.add(once or text)
    with suppress(OSError, ValueError):  # a closed stream
        print(f"warning: {for_terminal(text)}", file=sys.stderr, flush=True)


@contextmanager
def collected(take: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, what `warn` would print goes to `take`, each time."""
    _takers.append(take)
    try:
        yield
    finally:
        _takers.pop()


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
                told = f"{file.parent}: this disk cannot change modes ({error.strerror}); only you can read some files there"
                warn(told, once=f"modes of disk {part.stat().st_dev}")
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


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk. Where the disk cannot say so, as some network disks of folders, is one warning.

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


@contextmanager
def locked(folder: Path, doing: str, shown: Path | None = None, stays: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Holds `folder/.lock` while the block runs, so that two processes never write one folder.

    The system frees it when this process ends, however that happens; children do not hold it. The file is removed when the block ends,
    and stays where the process was killed.

    Args:
        folder: it must exist.
        doing: what this process does, for the other's message.
        shown: what messages call the folder, if not by its own name.
        stays: whether the file shall stay where the block raises.

    Raises:
        UserError: another process holds it, or something else has its name.
        OSError: the file cannot be made.
    """
    file = folder / ".lock"
    stream = _hold(file, shown or folder)
    _locks.add(stream)
    done = False
    try:
        with optional(f"writing {file}"):
            stream.seek(0)
            stream.truncate()
            stream.write(f"{doing} (process {os.getpid()} on {socket.gethostname()})\n")
            stream.flush()
        yield
        done = True
    finally:
        with optional(f"removing {file}"):
            if _is(file, stream) and (done or not stays()):  # the folder may have been moved meanwhile
                file.unlink()
        _locks.discard(stream)
        with suppress(OSError, ValueError):  # full disk
            stream.close()


def lock_text(file: Path) -> str | None:
    """What `locked` wrote into a lock file, or nothing yet; None of a file that is none of its own, and of no file."""
    try:
        with open_lock(file, os.O_RDONLY) as stream:
            return _own_text(stream)
    except (OSError, UserError):
        return None


def open_lock(file: Path, how: int = os.O_RDWR | os.O_CREAT) -> IO[str]:
    """Opens a lock file, and leaves what it holds.

    Raises:
        UserError: it is a link, a pipe, a folder: nothing that a command makes there.
        OSError: it cannot be opened.
    """
    fault = f"{file}: is no regular file; move it away, for a lock is made there"
    try:
        descriptor = os.open(file, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise UserError(fault) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(fault)
    return os.fdopen(descriptor, "r" if how == os.O_RDONLY else "r+", encoding="utf-8", errors="replace")


def _hold(file: Path, shown: Path) -> IO[str]:
    """The open lock file, locked if the disk has locks."""
    while True:
        stream = open_lock(file)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = for_terminal(stream.read(300).strip()) or "another process"
            stream.close()
            raise UserError(f"{shown}: is in use by {other}; wait for it, stop it, or give another --output") from None
        except OSError as error:
            warn(f"{shown}: this disk has no locks ({error.strerror}); make sure that no other process writes there")
        if not _is(file, stream):
            stream.close()  # its holder ended and removed it between our opening and our locking
        elif _own_text(stream) is None:
            stream.close()
            raise UserError(f"{file}: is of another program; move it away, for a lock is made there")
        else:
            return stream


def _own_text(stream: IO[str]) -> str | None:
    """The content of an open lock file that is empty or `locked` wrote."""
    stream.seek(0)
    text = stream.read(1000)
    return text if re.fullmatch(r"(?:[^\n]+ \(process \d+ on [^\n]*\)\n)?", text) else None


def _is(file: Path, stream: IO[str]) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(file.lstat(), os.fstat(stream.fileno()))
    except (OSError, ValueError):  # closed, in a child
        return False


def _let_go() -> None:
    """A forked child, such as a loader's worker, must not hold the lock of a parent that is killed."""
    for stream in _locks:
        with suppress(OSError, ValueError):
            stream.close()
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def _beside(path: Path, kind: str) -> Path:
    """A name beside `path` that nobody uses."""
    return path.with_name(f".{path.name if kind == 'old' else path.name[:60]}.{secrets.token_hex(4)}.{kind}")
