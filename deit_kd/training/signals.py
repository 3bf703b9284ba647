"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from deit_kd.errors import UserError

REQUEUE = 75  # exit code of a run that a signal stopped and the same command continues; sysexits.h calls it EX_TEMPFAIL


class Stopped(BaseException):
    """What the main thread did inside `Stop.waiting` ends: a signal came, or it failed for a `reason` that is the user's to mend.

    It is no Exception, because what reads images catches those.
    """

    def __init__(self, reason: UserError | None = None):
        self.reason = reason

    def give_reason(self) -> None:
        """Raises it, if there is one."""
        if self.reason is not None:
            raise self.reason from None


def stop_message(step: int, folder: Path) -> str:
    """What a run in this folder says that a signal stopped."""
    if not step:
        return "stopped before the first step; the same command starts again"
    return f"stopped at step {step}; the same command goes on from {folder / 'checkpoints'}"


def heard() -> list[signal.Signals]:
    """The signals that ask a run to stop. A SIGHUP that was ignored from the start, as nohup has it, stays ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *([] if ignored else [signal.SIGHUP])]


class Stop:
    """Turns `heard` signals into a request that the loop meets after the step; a second signal ends the process at once.

    A thread reads them, because a process that waits for another in a collective runs no handler of Python's. Signals of the same
    second are one request: a scheduler and the launcher that it signalled too often both send one.

    Args:
        alone: no other process takes part in the run, so that it may stop wherever it waits.
        grace: seconds that a process which is not alone may go on waiting for data after a signal. The others wait for it, so
            nothing can be saved any more; it ends with REQUEUE, before launchers kill it.
    """

    TOGETHER = 1.0  # seconds

    def __init__(self, alone: bool = False, grace: float = 20.0):
        self.alone, self.grace, self.requested = alone, grace, False
        self._waits_since, self._first = 0.0, 0.0  # 0: it does not wait; no signal came

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, self._interrupt) for number in heard()}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _listening.append(self)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        _listening.remove(self)
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # which ends the thread

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The block may take long and changes nothing that is kept: a signal, also one that came before, ends it at once.

        Raises:
            Stopped: a signal came, or a UserError, and this process is alone.
        """
        self._waits_since = time.monotonic()
        try:
            if self.requested:
                self._interrupt()
            yield
        except UserError as error:
            if not self.alone:
                raise
            raise Stopped(error) from None
        finally:
            self._waits_since = 0.0

    def _interrupt(self, number: int = 0, _: FrameType | None = None) -> None:
        """The handler of Python's: it runs in the main thread, at once if that waits in Python."""
        if number and not _listening:
            return  # in a loading process
        self.requested = True
        if self._waits_since and self.alone:
            self._waits_since = 0.0  # the next signal must not disturb the saving
            raise Stopped

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._read)
        while True:
            ready = poll.poll(None if self.alone or not self._first else 1000 * min(1.0, self.grace))
            received = os.read(self._read, 1) if ready else b"\0"
            if not received:
                break
            self._hear(received[0], time.monotonic())
        os.close(self._read)

    def _hear(self, number: int, now: float) -> None:
        """A signal, or 0 when none came for a while."""
        if number in self._before:
            if self._first and now - self._first > self.TOGETHER:
                os._exit(128 + number)
            self.requested, self._first = True, self._first or now
        elif self._first and self._waits_since and now - max(self._first, self._waits_since) > self.grace:
            print(
                "stopped while it waited for data, and unsaved; the same command goes on from the last checkpoint", file=sys.stderr
            )
            sys.stderr.flush()
            os._exit(REQUEUE)


_listening: list[Stop] = []


def _forget() -> None:
    """Ignores signals that a loading process inherits from the training process."""
    if _listening:
        signal.set_wakeup_fd(-1)
        _listening.clear()


os.register_at_fork(after_in_child=_forget)
