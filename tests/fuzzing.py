"""Mutations of right files: whatever reads one must succeed or end in one line, within 5 CPU seconds and 1 GB."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from deit_kd.errors import UserError
from deit_kd.text import printable

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))  # 500 for a long look
SECONDS, BYTES = 5, 1 << 30
bounded = settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

NASTY: list[Any] = [
    *(None, True, [], {}, "", "x", "\x00\x1b[31m", "\ud800", "../../etc", "y" * 100_000, [[]], [None], {"a": None}, ["x"] * 1000),
    *(0, -1, 1, 7, 1.5, 10**6, 10**9, 2**63, 10**30, 1e308, 1e-300, float("nan"), float("inf"), -float("inf")),
]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children)[:200]:
        yield from _places(child, (*place, key))


@st.composite
def changed(draw: st.DrawFn, right: Any) -> Any:
    """A copy of plain JSON values with one to three places replaced, removed or repeated."""
    value = copy.deepcopy(right)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(_places(value))))
        new = copy.deepcopy(draw(st.sampled_from(NASTY)))
        how = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if not place:
            if how == "replace" and draw(st.integers(0, 9)) == 0:
                return new
            continue
        owner = value
        for key in place[:-1]:
            owner = owner[key]
        if how == "replace":
            owner[place[-1]] = new
        elif how == "remove":
            del owner[place[-1]]
        elif isinstance(owner, list):
            owner.insert(place[-1], copy.deepcopy(owner[place[-1]]))
        else:
            owner[f"{place[-1]}_again"] = new
    return value


@st.composite
def damaged(draw: st.DrawFn, right: bytes) -> bytes:
    """Bytes that are cut, flipped, repeated, or hold something else."""
    content = bytearray(right)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "zero"]))
        if how == "cut":
            del content[at:]
        elif how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            content[at:at] = draw(st.sampled_from([b"\xff", b"\x00", b"[" * 2000, b'{"a":' * 900, b"9" * 5000, b"\xfe\xff", b"\n"]))
        elif how == "repeat":
            content += content[at : at + 1000]
        else:
            content[at : at + 8] = bytes(8)
    return bytes(content)


def json_bytes(right: Any) -> st.SearchStrategy[bytes]:
    """A right JSON document, changed in its values or in its bytes."""
    encoded = json.dumps(right).encode()
    deep = st.sampled_from([json.dumps(nested(n)).encode() for n in (50, 300)] + [b"[" * 100_000])
    values = changed(right).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
    return st.one_of(values, values, damaged(encoded), deep)


@contextmanager
def limited() -> Iterator[None]:
    """At most 5 seconds of CPU and 1 GB more of address space than now."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"took more than {SECONDS} CPU seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)


def survives(read: Callable[[], Any]) -> None:
    """Fails on anything but success or a UserError of one line."""
    try:
        with limited():
            read()
    except UserError as error:
        text = str(error)
        assert "\n" not in text.strip(), text
        assert text == printable(text), repr(text)
        assert len(text) < 2000, text[:2000]
