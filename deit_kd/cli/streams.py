"""Standard output and error: a program goes on where they cannot be written."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a reader that ended, a terminal that was closed, a descriptor that is not open


class _Forgiving:
    """A text stream that drops what cannot be written: nobody reads the pipe, the terminal is closed, the log's disk is full.

    Attributes:
        gone: whether nobody can read any more.
    """

    def __init__(self, stream: TextIO):
        self._stream, self.gone = stream, False
        if getattr(stream, "errors", None) == "strict":  # a name that the terminal's encoding lacks
            with suppress(OSError, ValueError):  # it flushes
                stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody closed it
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """A disk may have room again later. Else what comes goes to the null device, that of children and of C code too."""
        self.gone = self.gone or not isinstance(error, OSError) or error.errno in _GONE
        if self.gone:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive() -> None:
    """From now on no write to stdout or stderr fails. Standard descriptors that are closed are opened on the null device.

    Else the next file that is opened, a checkpoint perhaps, would get the number of stderr, and warnings of C code would go there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Forgiving):
            setattr(sys, name, _Forgiving(stream or cast(TextIO, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))))


def is_gone(stream: TextIO) -> bool:
    """Whether nobody can read any more what is written to this stream, after `forgive`."""
    return getattr(stream, "gone", False)
