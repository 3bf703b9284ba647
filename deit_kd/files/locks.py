"""Locks of folders: one program writes to each at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deit_kd.errors import UserError
from deit_kd.files.warn import optional, warn
from deit_kd.text import for_terminal

_locks: set[IO[str]] = set()


@contextmanager
def locked(folder: Path, doing: str, shown: Path | None = None, stays: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Holds `folder/.lock` while the block runs, so that two processes never write one folder.

    The system frees it when this process ends, however that happens; children do not hold it. The file is removed when the block ends,
    and stays where the process was killed.

    Args:
        folder: it must exist.
        doing: what this process does, for the other's message.
        shown: what messages call the folder, if not by its own name.
        stays: whether to keep the file if the block raises.

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
