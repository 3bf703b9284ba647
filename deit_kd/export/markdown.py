"""Templates of cards: whatever they insert is shown as it is, never read as Markdown, unless a filter says otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from deit_kd.text import for_code, for_markdown, printable


class Written(str):
    """Markdown that is inserted as it is."""

    __slots__ = ()


def render(template: Path, **values: Any) -> str:
    """Fills a template.

    Filters: `code` for code spans, `block` for a line of a block of code, `plural(word)` for a number with its word.
    """
    environment = Environment(undefined=StrictUndefined, autoescape=False, finalize=_inserted)
    environment.filters |= {"code": _code, "block": _block, "plural": _plural}
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def _inserted(value: Any) -> Any:
    if isinstance(value, (Written, int, float)) or value is None:
        return value
    text = str(value)
    core = text.strip(" ")
    if re.fullmatch(r"[\d.,e%+-]*", core):  # a number is no item of a list
        return text
    before, _, after = text.partition(core)
    return f"{before}{for_markdown(core)}{after}"


def _code(value: Any) -> Written:
    return Written(for_code(value))


def _block(value: Any) -> Written:
    return Written(printable(value).replace("```", "'''"))


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word if number == 1 else f'{word}es' if word.endswith(('s', 'ch')) else f'{word}s'}"
