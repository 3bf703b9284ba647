"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
import time


class Stop:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop meets after the step; a second signal ends the process at once.

    A thread reads them, because a process that waits for another in a collective runs no handler of Python's. Signals of the same
    second are one request: a scheduler and the launcher that it signalled too often both send one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> Stop:
        self.requested = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
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

    def _listen(self) -> None:
        since = 0.0
        while number := os.read(self._read, 1):
            if number[0] not in self.SIGNALS:
                continue
            if self.requested and time.monotonic() - since > 1:
                os._exit(128 + number[0])
            if not self.requested:
                self.requested, since = True, time.monotonic()
        os.close(self._read)


_listening: list[Stop] = []


def _forget() -> None:
    """What a signal does to a loading process is not the training process's business."""
    if _listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
