"""Where each image of tar shards lies, read from an index file or from the shards themselves, by whatever program they were made.

Names are taken apart as WebDataset does it: the key of `a/0001.seg.png` ends at the first dot of its last part, the rest is the extension.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from deit_kd.data.decode import MOST_BYTES, SUFFIXES
from deit_kd.data.sources.folders import HIDDEN, is_hidden
from deit_kd.errors import UserError
from deit_kd.files.documents import must_be_a_file, short
from deit_kd.files.warn import warn
from deit_kd.text import for_terminal

NAMES = ("shard", "offset", "size", "labels", "keys")
LABEL_KEYS = ("label", "labels", "fine_label", "cls")  # of KEY.json, where none is chosen
_MOST_HEADER = 1_000_000  # bytes of a tar header: extended headers may declare any length
_MOST_LABEL = 1_000_000  # bytes of a label's file
BLOCK = 512  # bytes of a tar header; files begin and end at multiples
_WHOLE = re.compile(r"[0-9]{1,9}")
_PARTS = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


class Index(NamedTuple):
    """Columns of one entry an image, in the order of the shards."""

    shard: np.ndarray  # [N] int, which file
    offset: np.ndarray  # [N] int, of its first byte
    size: np.ndarray  # [N] int, bytes
    labels: np.ndarray  # [N] int
    keys: np.ndarray  # [N] bytes


def load(file: Path, shards: Sequence[Path], classes: int) -> Index:
    """Reads an index file.

    Raises:
        UserError: it is damaged, or not of these shards and classes.
    """
    must_be_a_file(file, "remove it, and the shards are read through instead")
    for shard in shards:
        must_be_a_file(shard, "copy or pack it again")
    sizes = np.asarray([shard.stat().st_size for shard in shards], dtype=np.int64)
    most = int(sizes.sum()) // 1024  # an image takes a block for its name and at least one for its bytes
    try:
        with zipfile.ZipFile(file) as archive:
            index = Index(*(_column(archive, name, most) for name in NAMES))
    except (OSError, EOFError, ValueError, KeyError, TypeError, MemoryError, NotImplementedError, RuntimeError) as error:
        raise _damaged(file, error) from None
    except (zipfile.BadZipFile, zlib.error, SyntaxError, RecursionError, OverflowError) as error:
        raise _damaged(file, error) from None
    number_of, offset, size, labels, _ = index
    if len({len(column) for column in index}) != 1 or not len(number_of):
        raise _damaged(file, "its columns differ in length, or are empty")
    if min(column.min() for column in index[:4]) < 0:
        raise _damaged(file, "numbers below 0")
    if number_of.max() >= len(shards) or labels.max() >= classes:
        raise UserError(f"{file.parent}: shards or classes are missing that {file.name} describes; copy or pack it again")
    ends = np.zeros(len(shards), dtype=np.int64)
    np.maximum.at(ends, number_of, offset + size)
    for number, path in enumerate(shards):
        if not 0 < ends[number] <= sizes[number]:
            raise UserError(f"{path}: is cut off, or not the shard that {file.name} describes; copy or pack it again")
    if (np.diff(number_of) < 0).any():
        raise _damaged(file, "its rows are not in the order of the shards")
    edges = np.searchsorted(number_of, np.arange(len(shards) + 1))
    for number, path in enumerate(shards):
        rows = slice(edges[number], edges[number + 1])
        _must_describe(file, path, int(sizes[number]), offset[rows], size[rows])
    return index


def _must_describe(file: Path, shard: Path, length: int, offset: np.ndarray, size: np.ndarray) -> None:
    """Holds the rows of a shard against it: in the layout of `deit-kd pack` by their distances alone, else by reading it through.

    Raises:
        UserError: they leave out images, overlap, or begin or end elsewhere.
    """
    blocks = -(-size // BLOCK) * BLOCK
    label = 2 * BLOCK  # header and content of KEY.cls behind the image
    begins = np.concatenate([[0], (offset + blocks + label)[:-1]]) + BLOCK
    end = int(offset[-1] + blocks[-1]) + label
    if (offset == begins).all() and end <= length:
        with shard.open("rb") as stream:
            stream.seek(end)
            if not stream.read(BLOCK).strip(b"\0"):
                return
    images, _ = _members(shard, Counter())
    if [(begin, count) for _, begin, count in images.values()] != list(zip(offset.tolist(), size.tolist(), strict=True)):
        raise _damaged(file, f"it does not name the images of {shard.name} where they lie")


def read_noted(file: int, offset: int, size: int, label: int, key: bytes) -> bytes:
    """An image that an index names, whose tar headers must say the same of it.

    Args:
        file: descriptor of the shard.
        offset: of the image's first byte.
        size: bytes.
        label: the class; compared where KEY.cls lies behind the image, as `deit-kd pack` puts it.
        key: of the index.

    Raises:
        ValueError: another image lies there, or it has another label.
        OSError: the shard ends before.
    """
    blocks = -(-size // BLOCK) * BLOCK
    content = os.pread(file, BLOCK + blocks + 2 * BLOCK, offset - BLOCK)
    if len(content) < BLOCK + size:
        raise OSError(f"the shard ends within the image, after {max(0, len(content) - BLOCK):,} of {size:,} bytes")
    stem = key.rpartition(b"/")[2]
    name, stated = _header(content[:BLOCK])
    if stated != size or not (name.startswith(stem + b".") or len(name) == 100 or not key.isascii()):
        raise ValueError("another file lies in the shard where the index names it; remove the index, or pack again")
    behind = content[BLOCK + blocks :]
    if len(behind) == 2 * BLOCK:
        name, stated = _header(behind[:BLOCK])
        written = behind[BLOCK : BLOCK + min(stated, BLOCK)].strip()
        if name == stem + b".cls" and _WHOLE.fullmatch(written.decode("latin-1")) and int(written) != label:
            raise ValueError(f"the index says class {label}, the shard {int(written)}; remove the index, or pack again")
    return content[BLOCK : BLOCK + size]


def _header(block: bytes) -> tuple[bytes, int]:
    """(last part of the name, which is cut at 100 bytes; size) of a member; -1 if it is none."""
    name = block[:100].partition(b"\0")[0]
    try:
        stated = int(block[124:136].strip(b" \0") or b"-1", 8)
    except ValueError:
        stated = -1
    return name if len(name) == 100 else name.rpartition(b"/")[2], stated


def _damaged(file: Path, reason: object) -> UserError:
    what = for_terminal(" ".join(str(reason).split())[:200]) or type(reason).__name__
    return UserError(f"{file}: is damaged ({what}); remove it, and the shards are read through instead")


def _column(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """One array of an .npz, whose header is held against what it may be before its values are read."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name}: another version of numpy's format")
        shape, _, kind = np.lib.format.read_array_header_1_0(stream)
        right = "S" if name == "keys" else "iu"
        if kind.kind not in right or len(shape) != 1 or kind.itemsize > 1024 or kind.itemsize < 1:
            raise ValueError(f"{name}: is an array of {short(kind)} with {len(shape)} dimensions")
        count = shape[0] * kind.itemsize
        if not 0 <= shape[0] <= most or count > 512 * most or entry.file_size > count + 10_000:
            raise ValueError(f"{name}: {shape[0]:,} entries, the shards have room for {most:,}")
        values = np.frombuffer(stream.read(count), kind)
    if len(values) != shape[0]:
        raise ValueError(f"{name}: is cut off")
    if name == "keys":
        return values
    if len(values) and values.max() > 2**61:
        raise ValueError(f"{name}: numbers beyond 2^61")
    return values.astype(np.int64)


def read_through(shards: Sequence[Path], class_names: Sequence[str], label_key: str | None) -> tuple[Index, Counter[str]]:
    """The index of shards that came without one, and what is left out: images in their order, with the label of the same key.

    A label is KEY.cls, else a key of KEY.json, else KEY.txt: a number, or the name of a class. Where a class is named by digits, .cls
    holds numbers, as WebDataset has it, and texts are names.

    Args:
        shards: the files.
        class_names: of classes.json.
        label_key: of KEY.json, which then alone counts (cls: KEY.cls where it is there); None: one of `LABEL_KEYS`.

    Raises:
        UserError: a shard is damaged, or not of this layout, or labels contradict each other.
    """
    rows: list[tuple[int, int, int, int, bytes]] = []
    left_out, numbers = Counter[str](), {name: number for number, name in enumerate(class_names)}
    digits: dict[str, set[str]] = {}
    for number, file in enumerate(tqdm(shards, "reading shards through", unit="shard", delay=2, disable=None)):
        images, labels = _members(file, left_out)
        for key, (name, offset, size) in images.items():
            try:
                label = _label(labels.get(key, {}), label_key, numbers, digits)
            except ValueError as error:
                raise UserError(f"{file}: {for_terminal(key)}: {error}") from None
            if size > MOST_BYTES:
                raise UserError(f"{file}: {for_terminal(name)} has {size:,} bytes, which is no picture; pack it again")
            rows.append((number, offset, size, label, key.encode("utf-8", "surrogateescape")[:200]))
        left_out["labels without a picture"] += len(labels.keys() - images.keys())
    if not rows:
        ends = ", ".join(sorted(left_out)) or "nothing"
        raise UserError(
            f"{shards[0].parent}: no shard has a picture KEY.jpg beside its label ({for_terminal(ends)}); pack them again"
        )
    _must_be_clear(shards[0].parent, digits, numbers)
    columns: list[Any] = list(zip(*rows, strict=True))
    return Index(*map(np.asarray, columns)), +left_out


_Images = dict[str, tuple[str, int, int]]  # key -> name, offset, size


def _members(file: Path, left_out: Counter[str]) -> tuple[_Images, dict[str, dict[str, bytes]]]:
    """(pictures, {key: {extension: label's bytes}}) of a shard."""
    remedy = "copy or pack it again"
    must_be_a_file(file, remedy)
    images: _Images = {}
    labels: dict[str, dict[str, bytes]] = {}
    named: dict[tuple[str, str], str] = {}  # (key, extension) of a label -> the member's name
    try:
        with file.open("rb", buffering=0) as raw, tarfile.open(fileobj=_Bounded(raw), mode="r:") as tar:
            begin = -1
            while (member := tar.next()) is not None:
                if tar.offset <= begin:  # a negative size leads back
                    raise tarfile.ReadError(f"a damaged header at byte {begin:,}")
                begin = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                if member.isdir():
                    continue
                parts = _PARTS.fullmatch(member.name)
                if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..")):
                    left_out[HIDDEN] += 1
                elif not member.isreg() or member.issparse():
                    left_out["links and special members"] += 1
                elif parts is None:
                    left_out["without a suffix"] += 1
                elif (extension := parts[2].lower()) in ("cls", "json", "txt"):
                    if member.size > _MOST_LABEL:
                        raise UserError(
                            f"{file}: {for_terminal(member.name)} has {member.size:,} bytes, which is no label; {remedy}"
                        )
                    if (first := named.setdefault((parts[1], extension), member.name)) is not member.name:
                        both = f"{for_terminal(first)} and {for_terminal(member.name)}"
                        raise UserError(f"{file}: a key has two labels of one kind, {both}; remove one of them")
                    raw.seek(member.offset_data)
                    labels.setdefault(parts[1], {})[extension] = raw.read(member.size)
                elif f".{extension}" not in SUFFIXES:
                    left_out[f".{extension}"[:12]] += 1
                elif parts[1] in images:
                    both = f"{for_terminal(images[parts[1]][0])} and {for_terminal(member.name)}"
                    raise UserError(f"{file}: a key has two pictures, {both}; name one of them otherwise, such as KEY.other.png")
                else:
                    images[parts[1]] = member.name, member.offset_data, member.size
            _check_end(file, raw, tar.offset)
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OSError, OverflowError, RecursionError, MemoryError, EOFError, IndexError) as error:
        with file.open("rb") as start:
            packed = start.read(2) == b"\x1f\x8b"
        reason = "is compressed by gzip, so that no image can be read alone; unpack it with gunzip" if packed else None
        what = for_terminal(" ".join(str(error).split())[:200])
        raise UserError(f"{file}: {reason or f'cannot be read as a shard ({what}); {remedy}'}") from None
    return images, labels


class _Bounded(io.RawIOBase):
    """A file that is not read in large pieces: no header of a tar is large, whatever it declares."""

    def __init__(self, raw: io.FileIO):
        self.raw = raw

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.raw.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()


def _check_end(file: Path, raw: io.FileIO, offset: int) -> None:
    """Where tarfile stops there must be the end: it takes a damaged header for one."""
    if os.fstat(raw.fileno()).st_size < offset:
        raise tarfile.ReadError("it is cut off")
    raw.seek(offset)
    block = raw.read(512)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"a damaged header at byte {offset:,}")
    if not block:
        warn(f"{file}: has no mark of its end; if it was cut off, the images behind are missing")
    elif raw.read(1_000_000).strip(b"\0"):
        warn(f"{file}: holds more behind the mark of its end, which is not read; tars cannot be joined by cat")


_Digits = dict[str, set[str]]  # where a label stands -> the texts of digits that were found there


def _label(found: Mapping[str, bytes], label_key: str | None, numbers: Mapping[str, int], digits: _Digits) -> int:
    """The label of an image, from the files of its key.

    Raises:
        ValueError: there is none, it is of no class, or two contradict each other.
    """
    value, place = _stated(found, label_key)
    label = _number(value, place, numbers, digits)
    others: dict[str, int] = {}
    for other, content in _all(found) if label_key is None else ():
        with suppress(ValueError):  # a caption, or what else is no label
            others[other] = _number(content, other, numbers, {})
    others.pop(place, None)
    if others and label not in others.values():  # .json may hold a coarse label beside the fine one
        second, number = next(iter(others.items()))
        raise ValueError(
            f"{place} says class {label}, {second} says class {number}; remove one, or choose with data.label_column="
            f"{'cls' if place == '.cls' else place.split()[0]}"
        )
    return label


def _stated(found: Mapping[str, bytes], label_key: str | None) -> tuple[Any, str]:
    """(the label that counts, where it stands)"""
    if "cls" in found and label_key in (None, "cls"):
        return found["cls"].decode("utf-8", "replace"), ".cls"
    if "json" in found:
        try:
            content = json.loads(found["json"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f".json: cannot be read ({for_terminal(' '.join(str(error).split())[:200])}); pack it again") from None
        if not isinstance(content, dict):
            return content, ".json"
        keys = [key for key in ([label_key] if label_key else LABEL_KEYS) if key in content]
        if len(keys) > 1:
            raise ValueError(f".json has several labels, {', '.join(keys)}; choose one with data.label_column={keys[0]}")
        if keys:
            return content[keys[0]], f"{keys[0]} of .json"
        if "txt" not in found or label_key is not None:
            wanted = label_key or " or ".join(LABEL_KEYS)
            raise ValueError(
                f".json has the keys {short(sorted(map(str, content)))}, not {wanted}; choose one with data.label_column=KEY"
            )
    if "txt" in found and label_key is None:
        return found["txt"].decode("utf-8", "replace"), ".txt"
    raise ValueError("has no .cls beside it, nor a label in .json or .txt; a shard holds KEY.jpg and KEY.cls for each image")


def _all(found: Mapping[str, bytes]) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it holds) of everything beside a picture that may be its label."""
    if "json" in found:
        with suppress(ValueError, RecursionError):
            content = json.loads(found["json"])
            stated = content if isinstance(content, dict) else {}
            yield from ((f"{key} of .json", stated[key]) for key in LABEL_KEYS if key in stated)
            if not isinstance(content, dict):
                yield ".json", content
    if "txt" in found:
        yield ".txt", found["txt"].decode("utf-8", "replace")


def _number(value: Any, place: str, numbers: Mapping[str, int], digits: _Digits) -> int:
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int else ""
    if _WHOLE.fullmatch(text) and isinstance(value, str):
        digits.setdefault(place, set()).add(text)
    if place != ".cls" and isinstance(value, str) and text in numbers:
        return numbers[text]
    if _WHOLE.fullmatch(text):
        if int(text) >= len(numbers):
            raise ValueError(
                f"{place}: label {text} is none of the {len(numbers)} classes of classes.json, 0 to {len(numbers) - 1}"
            )
        return int(text)
    if text not in numbers:
        raise ValueError(f"{place} holds {short(value)}; needed is a number from 0 to {len(numbers) - 1}, or the name of a class")
    return numbers[text]


def _must_be_clear(folder: Path, digits: _Digits, numbers: Mapping[str, int]) -> None:
    """Texts of digits may be numbers, or names of classes: among all of a kind there is one that can be one of them alone."""
    for place, texts in digits.items():
        either = sorted(text for text in texts if numbers.get(text, int(text)) != int(text))
        only_numbers = sorted(texts - numbers.keys())
        if either and bool(only_numbers) != (place == ".cls"):
            mixed = f", and {only_numbers[0]} names none" if only_numbers else ""
            raise UserError(
                f"{folder}: {place} holds {either[0]}, which may be the class named {either[0]} (number {numbers[either[0]]}) or class "
                f"number {either[0]}{mixed}; write numbers into KEY.cls and give the classes other names in classes.json"
            )
