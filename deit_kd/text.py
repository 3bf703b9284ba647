"""Names and values of others made safe for the place where they are shown, and secrets kept out of all of them.

A place has a function: terminal, Markdown, Markdown code, picture, CSV, file name; JSON and YAML escape by themselves. What leaves the
machine or is stored goes through `redact`, which knows secrets and paths; what is printed here through `hide_secrets`, since a path tells
the user where to look.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

_HIDDEN = (
    "Cc",
    "Cf",
    "Cn",
    "Co",
    "Cs",
    "Zl",
    "Zp",
)  # control, direction and joining marks, unassigned, private, half of a pair, lines
_JOINERS = "\u200c\u200d"  # which Persian, Indic scripts and emoji spell words with
_STACKED = 3  # combining marks on one letter; more cover the lines around
_WORD = r"(?:api|access|secret|private|auth|account|signing)[_-]?keys?|pass(?:word|wd|phrase)|pwd|secrets?"
_SECRET = rf"{_WORD}|credentials?|sig(?:nature)?"
_TOKEN = r"(?<!class_)(?<!dist_)(?<!cls_)token"  # timm calls parts of a network so
_SHORT = r"(?<![A-Za-z0-9])(?:pass|auth|sas|pw)"  # secrets only as whole words
_SAID = (
    r"(?:a|an|cannot|has|is|missing|must|needs|no|not|nothing|null|state|stated|the|unknown)\s"  # our messages on a key begin so
)
_KNOWN_TOKENS = re.compile(
    r"\bhf_(?!datasets?\b|transfer\b)[A-Za-z0-9]{6,}|\bgh[opsur]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bsk-[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abpr]-[\w-]{10,}|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s&,;'\"}\])]+)"
_STATED = re.compile(
    rf"(?i)(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|token|digest)\s+)?)[^\s'\"]+"
    rf"|(\bbearer\s+(?:token\s+)?)(?!\.\.\.|of\s|token\b){_VALUE}"
    rf"|((?:{_SECRET}|{_TOKEN}|{_SHORT})[\"']?\s*=\s*)(?!\.\.\.){_VALUE}"
    rf"|((?:class|dist|cls)_token[\"']?\s*=\s*)(?!\.\.\.|(?:true|false|null|none|\d{{1,4}})(?!\w)){_VALUE}"
    rf"|((?:{_WORD})[\"']?:\s*)(?!\.\.\.|{_SAID}){_VALUE}"
    rf"|((?:{_SHORT}|(?<![\w.])token)[\"']:\s*)(?!\.\.\.){_VALUE}"
    rf"|((?<![\w.])token:\s*)(?!\.\.\.|{_SAID}){_VALUE}"
    rf"|({_TOKEN}[\"']?:\s*)[\"']?[\w.-]{{16,}}[\"']?"
    rf"|(--[\w-]{{0,40}}?(?:{_SECRET}|{_TOKEN})\s+)(?!-|\.\.\.){_VALUE}"
)
_SECRET_KEY = re.compile(rf"(?i)(?:{_SECRET}|{_TOKEN}|{_SHORT}|authorization)$")
# With user and password, which may hold what an address may not; or plain.
_SCHEME = r"(?:[a-zA-Z][a-zA-Z0-9+.-]{0,30}://|(?i:https?|s3|gs|gcs|ftps?|sftp|hf|az|abfss?|wasbs?|hdfs|ssh|git|webdavs?):/)"  # as Path writes it
_URL = re.compile(_SCHEME + r"(?:[^\s/@:'\"<>]*:(?:[^/@\n'\"<>]*|[^\s@,]{0,200})@)?(?:\[[\da-fA-F:.]*\])?[^\s'\"<>`)\]}]*")
_ACCOUNT = re.compile(
    r"(?<![\w.+/@-])(?!(?:hf[-_]hub|local-dir|file):)[\w.+-]+:(?!/)[^\s@:'\"]+@(?=[\w-]+[\w.-]*)"
)  # user:password@host without a scheme
_PART = r"[^/\\\0\n:;,'\"()<>|`\[\]]+"  # of a path; spaces count where another part follows
_LAST = r"[^/\\\s'\",;:()<>|`\[\]]*"
_NO_ADDRESS = "".join(rf"(?<!:[\da-fA-F]{{{digits}}}\])" for digits in range(5))  # https://[::1]/a/b is none of a folder
_VARIABLE = r"\$[A-Za-z_]\w*|\$\{\w+\}"
_PATH = re.compile(
    rf"(?:(?<![\w.:/\\~<\]…-])|(?<=local-dir:)|(?<=file:)|(?<=hf[-_]hub:)|{_NO_ADDRESS}(?<=[<\]…:])(?=/[^\s/<>|]+/))"
    rf"(?:~[\w.-]*|{_VARIABLE}|\.\.)?/+(?:\.\./)*(?=[^\s/|])(?:{_PART}/+)*({_LAST})"
    rf"|(?<![A-Za-z0-9])[A-Za-z]:[\\/](?:{_PART}[\\/]+)*({_LAST})"
    rf"|(?<![\w\\])\\\\[\w.$-]+\\(?=[A-Za-z0-9])(?:{_PART}\\+)*({_LAST})"
)
_WHOLE_PATH = re.compile(
    r"^(?:local-dir:|file:|hf[-_]hub:(?=/))?(?:~[^/\\]*[/\\]|~$|(?:\$\w+|\$\{\w+\})[/\\]|\.\.?[/\\]|/|\\\\\w|[A-Za-z]:[\\/])"
)
_HUB = re.compile(r"hf[-_]hub:(?!/)")
_CLOSED = re.compile(r"[:;,.!]$")  # of the sentence around an address


def printable(text: object, most: int = 0) -> str:
    """Text on one line: control characters, direction marks and bytes that are not UTF-8 as escapes, few marks on a letter.

    Args:
        text: any.
        most: characters that are kept; 0: all.
    """
    text = str(text)
    if most and len(text) > most:
        text = f"{text[: most - 1]}…"
    if text.isascii() and text.isprintable():
        return text
    shown: list[str] = []
    stacked, before = 0, ""
    for character in text:
        category = unicodedata.category(character)
        stacked = stacked + 1 if category in ("Mn", "Me") else 0
        joins = character in _JOINERS and not before.isascii()
        if (category in _HIDDEN and not joins) or stacked > _STACKED:
            shown.append(character.encode("unicode_escape", "surrogatepass").decode())
        else:
            shown.append(character)
        before = character
    return "".join(shown)


def for_terminal(text: object) -> str:
    """For a terminal or a log: one line that moves no cursor, without secrets."""
    return printable(hide_secrets(str(text)))


def lines_for_terminal(text: object) -> str:
    """`for_terminal` of each line."""
    return "\n".join(for_terminal(line) for line in str(text).split("\n"))


def error_for_terminal(error: object) -> str:
    """`for_terminal` of a message; where it lists faults, each is a line that begins with two spaces."""
    return "\n  ".join(for_terminal(line) for line in str(error).split("\n  "))


def for_markdown(text: object, most: int = 300) -> str:
    """For running text, a table cell or the text of a link in Markdown: shown as it is, never as markup, HTML, or a second cell."""
    escaped = printable(text, most).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*{}\[\]#|~$@]|:(?=[\w/])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", escaped)
    escaped = re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:3]}\\.", escaped)
    escaped = re.sub(r"^(\s*)([-+=])", r"\1\\\2", escaped)  # a list, a rule, or a heading above it
    return re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", escaped).strip()


def for_code(text: object, most: int = 300) -> str:
    """For Markdown as code, in a table or out of one: backticks around it, more than it holds in a row."""
    shown = printable(text, most).replace("|", "¦")  # a table would end its cell there, running text would show an escape
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if not shown or "`" in (shown[0], shown[-1]) or shown != shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def for_plot(text: object, most: int = 60) -> str:
    """For matplotlib, which reads `$` as mathematics."""
    return printable(text, most).replace("$", r"\$")


def for_csv(text: object) -> str:
    """For a table: a spreadsheet must not run it as a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.lstrip()[:1] in ("=", "+", "-", "@", "|") and not _is_number(shown) else shown


def for_file_name(text: object, most: int = 100) -> str:
    """For one part of a path: ASCII letters, digits and `._-` alone, at most so many bytes; no name of a device."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", printable(text)).strip("._-")[:most].rstrip("._-")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    return f"_{name}" if reserved else name or "unnamed"


def license_name(stated: object) -> str:
    """What a configuration says of a license, which may be of any type, as one short line; `unknown` if nothing that names one."""
    if isinstance(stated, (list, tuple)):
        names = [license_name(each) for each in stated if isinstance(each, str)]
        return ", ".join(dict.fromkeys(names))[:100] or "unknown"
    if isinstance(stated, Mapping):
        return license_name(stated.get("name") or stated.get("id") or stated.get("license"))
    return printable(" ".join(redact(stated).split()), 100) or "unknown" if isinstance(stated, str) else "unknown"


def hide_secrets(text: str) -> str:
    """URLs without user, password, query and fragment; tokens and passwords, known by their form, their key or the environment, as `...`."""
    text = _ACCOUNT.sub("...@", _URL.sub(lambda found: _bare_url(found[0]), text))
    text = _KNOWN_TOKENS.sub("...", text)
    text = _STATED.sub(lambda found: f"{next(group for group in found.groups() if group is not None)}...", text)
    for value in _secrets_of_environment():
        text = text.replace(value, "...")
    return text


def redact(text: str) -> str:
    """Text that may leave the machine: `hide_secrets`, and absolute, home and parent paths as `.../` and their last name."""
    key, equals, value = text.partition("=")
    if equals and re.fullmatch(r"-{0,2}[\w.-]+", key):
        return hide_secrets(f"{key}={_redact_value(value)}")
    return _redact_value(text)


def redact_path(text: str) -> str:
    """`redact` of a value that is known to be a path if it has folders: also a relative one becomes its last name."""
    if _URL.match(text) and not text.startswith("file:"):
        return hide_secrets(text)
    if _HUB.match(text) or not re.search(r"[/\\]", text):
        return hide_secrets(text)
    parts = [part for part in re.split(r"[/\\]+", text.rstrip("/\\")) if part not in ("", ".", "..", "~")]
    return f".../{hide_secrets(parts[-1])}" if len(parts) > 1 or _WHOLE_PATH.match(text) and parts else "..."


def redact_all(value: Any) -> Any:
    """`redact` of every text in nested mappings and lists, keys included; the value of a key such as `password` is left out."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            redact(key) if isinstance(key, str) else key: "..."
            if isinstance(key, str) and isinstance(each, str) and _SECRET_KEY.search(key)
            else redact_all(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_all(each) for each in value]
    return value


def redact_words(words: list[str]) -> list[str]:
    """A command line that may leave the machine: words that are paths, or whose value is one, keep their last name."""
    shown: list[str] = []
    for word in words:
        if shown and re.fullmatch(rf"(?i)--[\w-]{{0,40}}?(?:{_SECRET}|{_TOKEN})", shown[-1]):
            shown.append("...")
            continue
        key, equals, value = word.partition("=")
        if equals and re.fullmatch(r"-{0,2}[\w.-]+", key):
            shown.append(hide_secrets(f"{key}={redact_path(value) if _is_path(value) else redact(value)}"))
        else:
            shown.append(redact_path(word) if _is_path(word) else redact(word))
    return shown


def leaks(text: str) -> list[str]:
    """What `redact` would take out of a text, for a check before it is sent; of secrets only what they are."""
    found = []
    if hide_secrets(text) != text:
        found.append("a password, a token, or a URL with user or query")
    return found + list(dict.fromkeys(match[0] for match in _PATH.finditer(hide_secrets(text))))


def _redact_value(text: str) -> str:
    if _WHOLE_PATH.match(text) and ": " not in text and "\n" not in text:
        return redact_path(text)
    return _PATH.sub(_last_name, hide_secrets(text))


def _last_name(found: re.Match[str]) -> str:
    name = next((group for group in found.groups() if group), "")
    return f".../{name}" if name else "..."


def _is_path(text: str) -> bool:
    return "\n" not in text and bool(re.fullmatch(r"[^\[\]{}]*[/\\].*", text) or _WHOLE_PATH.match(text))


def _bare_url(found: str) -> str:
    url = _CLOSED.sub("", found)
    return _address(url) + found[len(url) :]


def _address(url: str) -> str:
    scheme, _, rest = url.partition(":/")
    rest = rest.removeprefix("/")
    host = rest.partition("/")[0]
    if scheme.lower() == "file":
        return url.partition("?")[0]  # a path
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        port = f":{parts.port}" if parts.port else ""
    except ValueError:  # no valid address
        return f"{scheme}://..."
    if "@" in parts.path + parts.query + parts.fragment and ":" in parts.netloc:  # a password with a character that ends the host
        return f"{scheme}://..."
    if not (parts.username or parts.password or "@" in host or parts.query or parts.fragment or "?" in url or "#" in url):
        return url
    name = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
    return f"{scheme}://{name}{port}{parts.path}"


def _secrets_of_environment() -> list[str]:
    return [value for key, value in os.environ.items() if len(value) >= 8 and _SECRET_KEY.search(key) and "/" not in value[:1]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
