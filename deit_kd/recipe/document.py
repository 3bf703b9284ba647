"""The door for YAML: bytes or an override to plain values, each scalar read as the type of its key asks.

Mappings, lists and scalars are all there is: no anchor, alias, merge key, tag or second document, no key twice. Text keys are text, words
of an enumeration are themselves (`no`, `auto`), numbers are decimal.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from deit_kd.errors import UserError
from deit_kd.files.documents import read_bytes, short
from deit_kd.text import printable

MOST_BYTES = 100_000  # the longest recipe has some 4,000
MOST_DEPTH = 12
MOST_DIGITS = 19  # of 2**63
NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII)
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # how UTF-16 and UTF-32 begin


class RecipeError(UserError):
    """Every fault of a recipe, one a line."""


@dataclass(frozen=True)
class Kind:
    """What a key takes, from its type in the schema."""

    words: frozenset[str] = frozenset()
    text: bool = False
    null: bool = False
    boolean: bool = False
    number: bool = False
    anything: bool = False
    section: type | None = None  # a dataclass of the schema
    items: tuple[Any, ...] = ()  # types of a tuple's places
    repeats: bool = False  # any number of the one place's type
    values: Any = None  # the type of a mapping's values

    def child(self, key: str) -> Kind:
        """Of a key in a mapping of this kind."""
        if self.section is not None:
            return kind_of(hints(self.section).get(key, Any))
        return kind_of(Any if self.values is None else self.values)

    def item(self, number: int) -> Kind:
        """Of a place in a list of this kind."""
        if self.repeats:
            return kind_of(self.items[0])
        return kind_of(self.items[number] if number < len(self.items) else Any)


@functools.cache
def hints(section: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(section)


@functools.cache
def kind_of(hint: Any) -> Kind:
    """The kind of a type, all of a union's together."""
    found: dict[str, Any] = {}
    for option in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            found["words"] = found.get("words", frozenset()) | {each for each in arguments if isinstance(each, str)}
        elif origin is tuple:
            found |= {"items": tuple(each for each in arguments if each is not ...), "repeats": ... in arguments}
        elif origin is dict:
            found["values"] = arguments[1]
        elif is_dataclass(option):
            found["section"] = option
        else:
            name = {str: "text", type(None): "null", bool: "boolean", int: "number", float: "number", Any: "anything"}[option]
            found[name] = True
    return Kind(**found)


def read_yaml(file: Path, kind: Kind) -> Any:
    """The one document of a YAML file.

    Raises:
        RecipeError: the file is missing, larger than 100 kB, not UTF-8, no YAML, or holds what a recipe has no use for.
    """
    try:
        content = read_bytes(file, "give the path of a recipe", MOST_BYTES)
    except UserError as error:
        raise RecipeError(printable(str(error))) from None
    where = printable(str(file))
    if content.startswith(_WIDE):
        raise RecipeError(f"{where}, line 1: is UTF-16 or UTF-32 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{where}, line {line}: is not UTF-8 text (perhaps Latin-1); save it as UTF-8") from None
    try:
        return _Reader(text).document(kind)
    except _Fault as fault:
        raise RecipeError(f"{where}, line {fault.line}: {printable(fault.what)}") from None


def read_override(text: str, kind: Kind) -> Any:
    """The value of `key=text`. Of a text key it is the text; null only where the key may be null.

    Raises:
        ValueError: it cannot be read.
    """
    if not text or (kind.text and kind.null and text in NULLS):
        return None
    if kind.text or text in kind.words:
        return text
    try:
        return _Reader(re.sub(r"^([-+]?)0+(?=[0-9]+$)", r"\1", text)).document(kind)  # 010 is ten
    except _Fault as fault:
        raise ValueError(f"{short(text)} cannot be read ({printable(fault.what)})") from None


def _line(event: Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


@dataclass
class _Fault(Exception):
    line: int
    what: str


@dataclass
class _Reader:
    """Turns the events of a YAML parser into values as they come, so that nothing large is ever made."""

    text: str
    events: Iterator[Event] = field(init=False)

    def document(self, kind: Kind) -> Any:
        try:
            self.events = yaml.parse(self.text, Loader=yaml.SafeLoader)
            event = self._next()
            while not isinstance(event, (DocumentStartEvent, StreamEndEvent)):
                event = self._next()
            value = None if isinstance(event, StreamEndEvent) else self._value(self._next(), kind, 1)
            while not isinstance(event, StreamEndEvent):
                event = self._next()
                if isinstance(event, DocumentStartEvent):
                    self._refuse(event, "a second document begins; a recipe is one")
        except yaml.reader.ReaderError as error:
            line = self.text[: error.position].count("\n") + 1
            raise _Fault(line, f"character U+{error.character:04X} is not allowed in YAML; take it out") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = "; ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
            raise _Fault(mark.line + 1 if mark else 1, f"not valid YAML: {what}") from None
        except (yaml.YAMLError, ValueError, OverflowError, IndexError) as error:  # the parser's own: \UFFFFFFFF, %YAML 1.999...
            raise _Fault(1, f"not valid YAML: {short(str(error), 100)}") from None
        return value

    def _next(self) -> Event:
        return next(self.events)

    def _refuse(self, event: Event, what: str) -> typing.NoReturn:
        raise _Fault(_line(event), what)

    def _value(self, event: Event, kind: Kind, depth: int) -> Any:
        if isinstance(event, AliasEvent):
            self._refuse(event, f"an alias (*{short(event.anchor)[1:-1]}); write the value out")
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            self._refuse(event, f"an anchor (&{short(anchor)[1:-1]}); write the value out where it is needed")
        if tag is not None:
            self._refuse(event, f"a tag ({short(tag)[1:-1]}); leave it out, the schema knows the type")
        if depth > MOST_DEPTH:
            self._refuse(event, f"more than {MOST_DEPTH} levels; a recipe needs five")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, kind)
        if isinstance(event, SequenceStartEvent):
            found: list[Any] = []
            while not isinstance(event := self._next(), SequenceEndEvent):
                found.append(self._value(event, kind.item(len(found)), depth + 1))
            return found
        assert isinstance(event, MappingStartEvent)
        return self._mapping(kind, depth)

    def _mapping(self, kind: Kind, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.anchor is not None or event.tag is not None:
                self._refuse(event, "a key that is no plain text; write key: value")
            key, line = event.value, _line(event)
            if key == "<<":
                self._refuse(event, "a merge key (<<); write the keys out")
            if key in lines:
                where = f"on line {lines[key]}, too" if lines[key] != line else "twice"
                self._refuse(event, f"{short(key)} stands {where}; keep one of the two")
            lines[key] = line
            values[key] = self._value(self._next(), kind.child(key), depth + 1)
        return values

    def _scalar(self, event: ScalarEvent, kind: Kind) -> Any:
        text: str = event.value
        if event.style is not None or text in kind.words:
            return text
        if text in NULLS:
            return None
        if kind.text:
            return text
        if (kind.boolean or kind.anything) and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if kind.number or kind.anything:
            if INTEGER.fullmatch(text):
                if len(text) > MOST_DIGITS + 1:
                    self._refuse(event, f"a number of {len(text)} digits; at most {MOST_DIGITS} are read")
                if re.match(r"[-+]?0[0-9]", text):
                    self._refuse(event, f"{text} begins with 0, which some read as octal; write the number without it")
                return int(text)
            if FLOAT.fullmatch(text):
                number = float(text) if text[-1] in "0123456789." else math.nan  # .inf, .nan
                if not math.isfinite(number):
                    self._refuse(event, f"{short(text)} is not a finite number")
                return number
        return text
