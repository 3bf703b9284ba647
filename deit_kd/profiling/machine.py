"""What a run needs of the machine beside its devices: workers, shared memory, open files, and a disk that keeps what it is given."""

from __future__ import annotations

import errno
import fcntl
import resource
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deit_kd.data import Source, TrainLoader
from deit_kd.data.transforms import Transform
from deit_kd.data.workers import SHARED_MEMORY, Batches, shared_memory_free, stack
from deit_kd.files.atomic import fsync
from deit_kd.files.warn import optional
from deit_kd.tasks.ready import Line

SECONDS = 90  # that a worker has for its first batch


class _Some(Dataset[Tensor]):
    """Batches of the first images of a source, as in evaluation; zeros for an image that cannot be read, which the loader reports."""

    def __init__(self, source: Source, transform: Transform, size: int):
        self.source, self.transform, self.size = source, transform, size

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.transform(self.source[index % len(self.source)][0])
        except Exception:
            return torch.zeros(3, self.size, self.size)

    def __getitems__(self, count: int) -> list[Tensor]:
        return [self[index] for index in range(count)]


def workers(count: int, source: Source, transform: Transform, size: int, batch_size: int) -> Line:
    """Starts one worker and takes a batch from it, as the run does; it has `SECONDS`.

    Args:
        count: workers of this process.
        source: of the images.
        transform: as in evaluation.
        size: pixels a side.
        batch_size: images of a micro-batch.
    """
    if not count:
        return Line("ok", "workers", "none: the main process reads the images")
    notes: list[str] = []
    found: list[Any] = []
    batches = Batches(_Some(source, transform, size), stack, 1, False, notes.append, lambda _: "the first batch")

    def take() -> None:
        try:
            found.extend(batches([batch_size]))
        except Exception as error:  # of the worker's, too
            found.append(error)

    taking = threading.Thread(target=take, daemon=True)
    taking.start()
    taking.join(SECONDS)
    batches.close()
    remedy = "run.workers=0 reads in the main process; else look at the speed of the data's disk, and at TMPDIR"
    if not found:
        return Line("fail", "workers", f"the first gave no batch of {batch_size} images in {SECONDS} s; {remedy}")
    if isinstance(found[0], Exception):
        return Line(
            "fail", "workers", f"the first gave no batch ({(str(found[0]).strip().splitlines() or [''])[-1][:200]}); {remedy}"
        )
    if notes:  # it survives that, more slowly
        return Line("warn", "workers", notes[0])
    return Line("ok", "workers", f"{count} a process; one was started and gave {batch_size} images")


def shared_memory(loader: TrainLoader, local_processes: int) -> Line:
    """Whether the batches that workers have ready fit into shared memory; else they come through pipes, more slowly.

    Args:
        loader: of training images.
        local_processes: training processes on this machine.

    Raises:
        UserError: an image that cannot be read, when the recipe refuses such.
    """
    count, free = loader.loader_config.workers, shared_memory_free()
    if not count:
        return Line("ok", "memory", "no worker shares any")
    if free is None:
        return Line("warn", "memory", f"{SHARED_MEMORY} cannot be looked at: batches may come through pipes, which is slower")
    needed = loader.shared_bytes() * local_processes
    text = f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, batches of {count} workers need {needed / 1e6:,.1f} MB"
    if free < needed:
        more = "enlarge it (docker run --shm-size 8g; Kubernetes: launch/kubernetes.yaml), or set fewer run.workers"
        return Line("warn", "memory", f"{text}: they come through pipes, which is slower; {more}")
    return Line("ok", "memory", text)


def descriptors(count: int, local_processes: int) -> Line:
    """Whether a process may open as many files as it will.

    Args:
        count: workers of this process.
        local_processes: training processes on this machine.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 128 + 16 * count + 8 * local_processes  # libraries and devices; pipes and shared tensors of each worker; connections
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    text = f"ulimit -n is {limit}, a run opens about {needed:,} files"
    if soft == resource.RLIM_INFINITY or soft >= 2 * needed:
        return Line("ok", "files", text)
    most = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    more = f"ulimit -n {most} before the run" if most > soft else "ask for a higher hard limit"
    return Line("fail" if soft < needed else "warn", "files", f"{text}: {more}, or set fewer run.workers")


def disk_operation(name: str, folder: Path) -> Line:
    """Tries locks, flushes or modes (umask) in a folder that runs are kept in."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor", ignore_cleanup_errors=True) as place:
            return DISK_OPERATIONS[name](Path(place), folder)
    except OSError as error:
        return Line("fail", name, f"{folder}: cannot be written to ({error.strerror or error}): give another --output")


def _locks(place: Path, folder: Path) -> Line:
    with (place / "lock").open("w") as first, (place / "lock").open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Line(
                "warn", "locks", f"{folder}: this disk has no locks ({error.strerror}): two runs in one folder are not noticed"
            )
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                return Line("ok", "locks", f"{folder}: a second lock is refused")
            raise
    return Line("warn", "locks", f"{folder}: this disk gives a lock twice: two runs in one folder are not noticed")


def _flush(place: Path, folder: Path) -> Line:
    file = place / "file"
    file.write_bytes(b"x")
    cannot = []
    for path in (file, place):
        try:
            fsync(path)
        except OSError as error:
            if path == file and error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                return Line(
                    "fail", "flush", f"{folder}: a file cannot be flushed ({error.strerror}): give an --output on another disk"
                )
            cannot.append(f"{'files' if path == file else 'folders'} ({error.strerror})")
    if cannot:
        text = (
            f"{folder}: this disk cannot flush {' and '.join(cannot)}: runs go on, and a power cut may lose the newest checkpoint"
        )
        return Line("warn", "flush", text)
    return Line("ok", "flush", f"{folder}: files and folders are flushed")


def _umask(place: Path, _: Path) -> Line:
    file = place / "mode"
    file.touch()
    mode = file.stat().st_mode & 0o777
    text = f"new files get mode {mode:03o}"
    with optional(f"changing the mode of {file}", lambda _: None):
        file.chmod(mode)
    if mode & 0o600 != 0o600:
        return Line("fail", "umask", f"{text}, which their owner cannot read again: set umask 022, or 077 to keep others out")
    return Line("ok", "umask", text)


DISK_OPERATIONS: dict[str, Callable[[Path, Path], Line]] = {"locks": _locks, "flush": _flush, "umask": _umask}
