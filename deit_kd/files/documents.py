"""Reads JSON of others through a typed schema with bounds, and checks its size first.

Whatever is wrong with a file ends in one line: the file, the place in it, what is wrong, what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from deit_kd.errors import UserError
from deit_kd.text import printable

MEGABYTE = 1_000_000
T = TypeVar("T")
# What pydantic wanted, by its error's type or the beginning of that.
WANTED = {
    "int": "an integer",
    "int_from_float": "an integer",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


class Document(BaseModel):
    """A mapping in a file. Types are strict, numbers finite; keys that a schema does not name are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def read_json(file: Path, schema: type[T], remedy: str, most_bytes: int = 16 * MEGABYTE) -> T:
    """Reads a JSON file through `schema`.

    Args:
        file: its path.
        schema: a `Document`, or any type that pydantic checks, with bounds.
        remedy: what the user does about a bad file.
        most_bytes: a larger file is refused before it is read.

    Raises:
        UserError: the file is missing, too large, no JSON, or not of the schema.
    """
    return parse_json(read_bytes(file, remedy, most_bytes), str(file), schema, remedy)


def parse_json(content: bytes | str, where: str, schema: type[T], remedy: str) -> T:
    """`read_json` of bytes that are read already; `where` names them in messages.

    Raises:
        UserError: as `read_json`.
    """
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}; {remedy}") from None


def check(content: Any, where: str, schema: type[T], remedy: str) -> T:
    """`parse_json` of plain Python values.

    Raises:
        UserError: as `read_json`.
    """
    try:
        return TypeAdapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}; {remedy}") from None


def read_bytes(file: Path, remedy: str, most_bytes: int) -> bytes:
    """The content of a regular file of at most `most_bytes`.

    Raises:
        UserError: the file is missing, no regular file, larger, or cannot be read.
    """
    must_be_a_file(file, remedy, most_bytes)
    try:
        with file.open("rb") as stream:
            content = stream.read(min(file.stat().st_size, most_bytes) + 1)  # which is all the memory it takes
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); {remedy}") from None
    if len(content) > most_bytes:
        raise UserError(f"{file}: is larger than {most_bytes / MEGABYTE:g} MB; {remedy}")
    return content


def must_be_a_file(file: Path, remedy: str, most_bytes: float = float("inf")) -> None:
    """Refuses what is no regular file (a FIFO would wait for ever), or is larger than `most_bytes`.

    Raises:
        UserError: it is so.
    """
    try:
        size = file.stat().st_size
        regular = file.is_file()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from None
    if not regular:
        raise UserError(f"{file}: is no regular file; {remedy}")
    if size > most_bytes:
        raise UserError(f"{file}: is {size / MEGABYTE:,.1f} MB large, at most {most_bytes / MEGABYTE:g} MB are right; {remedy}")


def first_fault(error: ValidationError) -> str:
    """The first fault of pydantic's in one line: `place: what is wrong, got VALUE`, and how many more there are."""
    faults = error.errors(include_url=False)
    first = faults[0]
    place = printable(".".join(str(part) for part in first["loc"])[:200])
    got = "" if first["type"] in ("missing", "json_invalid") else f", got {short(first['input'])}"
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return f"{place + ': ' if place else ''}{what_is_wrong(first)}{got}{more}"


def what_is_wrong(detail: Any) -> str:
    """One of pydantic's errors in words: `must be an integer`."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"must be {words} {context[bound]:,}"
    if kind in ("too_long", "too_short") and context["field_type"] == "Tuple":
        at_most = kind == "too_long"
        return f"must be a list of at {'most' if at_most else 'least'} {context['max_length' if at_most else 'min_length']} items"
    wanted = WANTED.get(kind) or WANTED.get(kind.partition("_")[0] if kind.endswith(("_type", "_parsing")) else "")
    return f"must be {wanted}" if wanted else " ".join(detail["msg"].removeprefix("Value error, ").split())


def short(value: Any, most: int = 60) -> str:
    """A value's text, cut to `most` characters."""
    text = repr(value if not isinstance(value, (str, bytes)) else value[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."
