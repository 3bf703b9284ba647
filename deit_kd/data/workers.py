"""Worker processes that load batches, how their batches arrive, and what happens when a worker dies or hangs.

A batch's large tensors come through shared memory. Where that has no room, or descriptors cannot be handed over, they come through
a pipe, which is slower. A process that dies is replaced. A line says when no batch comes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from deit_kd.errors import UserError
from deit_kd.files.warn import warn

SHARED_MEMORY = Path("/dev/shm")
CGROUPS = Path("/sys/fs/cgroup")
SMALL = 1 << 16  # bytes; a smaller tensor is quicker through the pipe, and takes no descriptor
DEATHS = 3  # of loading processes, with no batch between them, end the run

_cannot_share: str | None = None  # in a loading process: why its batches come through the pipe


def cores() -> int:
    """The CPU cores that this process may use: by its affinity, and by the quota of its cgroup, which containers and Slurm set."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with suppress(OSError, ValueError, IndexError):
        own = Path("/proc/self/cgroup").read_text().split("::")[1].split("\n")[0].lstrip("/")
        folders = [CGROUPS / own, *(CGROUPS / own).parents]
        for folder in folders[: folders.index(CGROUPS) + 1]:
            with suppress(OSError, ValueError):  # no file, or "max": no quota there
                quota, period = (folder / "cpu.max").read_text().split()
                allowed = min(allowed, float(quota) / float(period))
    return max(1, int(allowed))


def shared_memory_free() -> int | None:
    """Free bytes of shared memory; None where the system does not report them."""
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).free
    return None


def cannot_hand_over() -> str | None:
    """Why this process cannot pass a file descriptor to another, which shared memory needs; None if it can."""
    read, write = os.pipe()
    try:
        os.close(resource_sharer.DupFd(read).detach())
    except Exception as error:  # a path too long for a socket, a folder that is full or not there, no descriptor left
        return str(error) or type(error).__name__
    finally:
        os.close(read)
        os.close(write)
    return None


def stack(tensors: list[Tensor]) -> Tensor:
    """[B,...] of equal shapes; in a loading process it lies in shared memory, if that has room."""
    global _cannot_share
    if torch.utils.data.get_worker_info() is not None and _cannot_share is None:
        try:
            return default_collate(tensors)
        except RuntimeError as error:
            _cannot_share = _of_full_memory(error)
    return torch.stack(tensors)


class _Parcel:
    """A batch on its way from a loading process; it arrives as (batch, why it does not use shared memory)."""

    def __init__(self, batch: Any):
        self.batch = _each_tensor(batch, _share)

    def __reduce__(self) -> tuple[Any, ...]:
        packed = _each_tensor(self.batch, lambda tensor: tensor if tensor.is_shared() else tensor.numpy())
        return _arrived, (packed, _cannot_share)


def _arrived(batch: Any, note: str | None) -> tuple[Any, str | None]:
    return _each_tensor(batch, lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value), note


def _share(tensor: Tensor) -> Tensor:
    global _cannot_share
    if _cannot_share is None and tensor.nbytes > SMALL:
        try:
            return tensor.share_memory_()
        except RuntimeError as error:
            _cannot_share = _of_full_memory(error)
    return tensor


def _each_tensor(value: Any, change: Callable[[Any], Any]) -> Any:
    """Tensors and arrays in tuples and lists, changed."""
    if isinstance(value, (Tensor, np.ndarray)):
        return change(value)
    if isinstance(value, (tuple, list)):
        made = [_each_tensor(each, change) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def count_bytes(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    counted: list[int] = []
    _each_tensor(batch, lambda tensor: counted.append(tensor.nbytes))
    return sum(counted)


def _of_full_memory(error: Exception) -> str:
    free = shared_memory_free()
    room = "" if free is None else f", {free / 1e6:.0f} MB free"
    return f"shared memory ({SHARED_MEMORY}{room}) has no room for a batch: {' '.join(str(error).split())[-80:]}"


def _pack(collate: Callable[[Any], Any], items: Any) -> Any:
    batch = collate(items)
    return (batch, None) if torch.utils.data.get_worker_info() is None else _Parcel(batch)


def _begin(_: int) -> None:
    """Sets up a worker process."""
    global _cannot_share
    os.setpgrp()  # a terminal's Ctrl-C and a scheduler's SIGTERM go to the whole group; the training process ends this one
    if reason := cannot_hand_over():
        _cannot_share = f"descriptors cannot be handed over ({reason})"


class _Order(Sampler[Any]):
    """The keys of this process's batches, in order."""

    def __init__(self) -> None:
        self.keys: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Batches:
    """Batches of a data set in a given order, made by processes beside this one, or by itself.

    Args:
        dataset: its `__getitems__` takes a key and gives the items of a batch.
        collate: makes a batch of them; of tensors in tuples and lists.
        workers: processes; 0 makes batches here.
        pin: batches are put into pinned memory.
        say: prints a line, on one process of the run.
        describe: a key's images in words, for a batch that does not come.
        patience: seconds without a batch after which a line says so; after 30 times as many the run is asked to stop.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[Any], Any],
        workers: int,
        pin: bool,
        say: Callable[[str], None],
        describe: Callable[[Any], str],
        patience: float = 60.0,
    ):
        self.workers, self.say, self.describe, self.patience = workers, say, describe, patience
        self._order, self._said = _Order(), False
        self._make: Callable[..., DataLoader[Any]] = partial(
            DataLoader, dataset, batch_sampler=self._order, collate_fn=partial(_pack, collate), pin_memory=pin
        )
        self._loader = self._new_loader()
        self._processes: set[Any] = set()
        self._closed = False
        # When the garbage collector finds a loader, torch waits 5 seconds for each of its processes, which never hear that they should end.
        weakref.finalize(self, _kill, self._processes).atexit = False

    def close(self) -> None:
        """Ends the processes, also those that hang; a caller that waits for a batch gets an error within seconds."""
        self._closed = True
        _kill(self._processes)

    def __call__(self, keys: Sequence[Any]) -> Iterator[Any]:
        """The batch of each key.

        Raises:
            UserError: loading processes die again and again.
        """
        done, died, stream = 0, 0, None
        while done < len(keys):
            try:
                with _watch.waiting(self.describe, keys[done], self.patience):
                    if stream is None:
                        stream = self._start(keys[done : done + 1] if died else keys[done:])  # to know which batch kills
                    batch, note = next(stream)
            except Exception as error:
                if self._closed or not (self.workers and _tells_of_a_death(error)):
                    raise
                died, stream = died + 1, None
                self._replace(died, keys[done])
                continue
            except BaseException:  # a signal: a process that hangs must not keep this one
                _kill(self._processes)
                raise
            if note and not self._said:
                self._said = True
                self.say(
                    f"{note}; batches come through pipes, which is slower: give a container more of it (--shm-size=8g), lower "
                    "run.workers, or set TMPDIR to a short path with room"
                )
            done, died, stream = done + 1, 0, None if died else stream
            yield batch

    def _new_loader(self) -> DataLoader[Any]:
        return self._make(
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # the loader draws its own base seed from it, not from the model's stream
        )

    def _start(self, keys: Sequence[Any]) -> Iterator[Any]:
        self._order.keys = keys
        before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self._loader)
        except (OSError, ImportError) as error:  # no semaphore, no process, no memory
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            self.say(f"loading processes cannot start ({error}); this process loads the images itself, as with run.workers=0")
            self.workers = 0
            self._loader = self._new_loader()
            return iter(self._loader)
        finally:
            self._processes |= set(multiprocessing.active_children()) - before
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(
                    signal.SIGCHLD, handler
                )  # torch's raises wherever this process is, in a save too; `next` reports the death as well

    def _replace(self, died: int, key: Any) -> None:
        """Replaces all processes after one died."""
        _kill(self._processes)
        codes = {process.exitcode for process in self._processes} - {None, 0, -signal.SIGKILL}
        if died == DEATHS:
            raise UserError(
                f"a loading process died {died} times at the same batch ({self.describe(key)}{_named(codes)}); look for an image that "
                "crashes its decoder, or lower run.workers if memory is short; the same command goes on"
            )
        warn(f"a loading process died{_named(codes)}, as the system ends one when memory is short; others take its place ({died})")
        self._processes.clear()
        self._loader = self._new_loader()


def _kill(processes: set[Any]) -> None:
    for process in processes:
        process.kill()
        process.join(1)


def _tells_of_a_death(error: Exception) -> bool:
    """Whether torch says that a loading process died, or it died while it handed a batch over."""
    if isinstance(error, (EOFError, ConnectionError, FileNotFoundError)):
        return not str(error).startswith("Caught ")  # as those do that a process raised and survived
    return isinstance(error, RuntimeError) and str(error).startswith(("DataLoader worker", "Pin memory thread exited"))


def _named(codes: set[int]) -> str:
    return f", by {signal.Signals(-min(codes)).name}" if codes and min(codes) < 0 else ""


class _Watch:
    """Reports, from a thread of its own, a batch that does not arrive."""

    def __init__(self) -> None:
        self._waits: tuple[float, Callable[[Any], str], Any, float] | None = None  # since, who names it, what, and patience
        self._process = 0  # that the thread is of

    @contextmanager
    def waiting(self, describe: Callable[[Any], str], key: Any, patience: float) -> Iterator[None]:
        """The block waits for the batch of a key."""
        if self._process != os.getpid():
            self._process = os.getpid()
            threading.Thread(target=self._look, daemon=True).start()
        self._waits = time.monotonic(), describe, key, patience
        try:
            yield
        finally:
            self._waits = None

    def _look(self) -> None:
        reported: tuple[Any, ...] | None = None
        next_time = 0.0
        while True:
            waits = self._waits
            time.sleep(min(1.0, waits[3] / 4) if waits else 1.0)
            if waits is None or waits is not self._waits:
                continue
            since, describe, key, patience = waits
            if waits is not reported:
                reported, next_time = waits, patience
            seconds = time.monotonic() - since
            if seconds < next_time:
                continue
            next_time = 2 * seconds
            if seconds > 30 * patience:
                warn(f"no batch came for {seconds:.0f} s; the run is asked to stop")
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                warn(f"waits for {describe(key)} since {seconds:.0f} s; is its disk there?")


_watch = _Watch()
