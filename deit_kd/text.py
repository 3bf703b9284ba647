"""Names and values of others made safe for the place where they are shown, and secrets kept out of all of them."""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from urllib.parse import urlsplit

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]+")
_PATH = re.compile(r"(?<![\w.:/-])(?:~|\.{1,2})?/(?:[^/\s'\",;:()]+/)*([^/\s'\",;:()]*)")


def printable(text: str) -> str:
    """Text on one line: control characters, direction marks and bytes that are not UTF-8 as escapes."""
    return "".join(_shown(character) for character in str(text))


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape", "surrogatepass").decode()
    return character


def for_terminal(text: str) -> str:
    """For a terminal or a log: `printable`."""
    return printable(text)


def for_markdown(text: str) -> str:
    """For a model card: shown as it is, never as markup, HTML or a second table cell."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", escaped)


def for_plot(text: str) -> str:
    """For matplotlib, which reads `$` as mathematics."""
    return printable(text).replace("$", r"\$")


def for_csv(text: str) -> str:
    """For a table: a spreadsheet must not run it as a formula."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") and not _is_number(shown) else shown


def for_file_name(text: str, most: int = 100) -> str:
    """For one part of a path: letters, digits, `._-` alone."""
    name = re.sub(r"[^\w.-]+", "_", printable(text)).strip("._")[:most]
    return name or "unnamed"


def redact(text: str) -> str:
    """Text that may leave the machine: URLs without user, password and query; absolute paths as their last name."""
    text = _URL.sub(lambda found: _redact_url(found[0]), text)
    return _PATH.sub(lambda found: f".../{found[1]}", text)


def redact_all(value: Any) -> Any:
    """`redact` of every text in nested mappings and lists."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_all(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(each) for each in value]
    return value


def _redact_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:  # no valid address
        return f"{url.partition('://')[0]}://..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
