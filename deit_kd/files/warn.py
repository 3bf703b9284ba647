"""Lines to stderr about what is doubtful, each once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from deit_kd.text import for_terminal

said: set[str] = set()  # lines, or their keys, that this process printed
_takers: list[Callable[[str], None]] = []  # of `collected`, the innermost last


def warn(text: str, once: str | None = None) -> None:
    """Prints a line to stderr, the same line once; where nobody reads it any more, it is dropped.

    Args:
        text: the line.
        once: lines with the same key count as the same.
    """
    if _takers:
        _takers[-1](text)
        return
    if (once or text) in said:
        return
    said.add(once or text)
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
