"""The record that `deit-kd pack` keeps beside its shards. By it the same command knows a folder that is whole, incomplete, or of other data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from deit_kd.data.sources.base import Source, Split
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.errors import UserError
from deit_kd.files.atomic import sha256, write_json
from deit_kd.files.documents import MEGABYTE, Document, read_json
from deit_kd.text import for_terminal

FILE = "pack.json"
KEYS = {"images": "other images, or changed ones", "short_side": "another --short-side", "shard_bytes": "another --shard-mb"}
_Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]+\.(tar|npz|json)$")]


class Made(Document):
    """What was asked for, and the size and hash of each file that was written."""

    short_side: int | None
    shard_bytes: int
    images: str
    files: dict[_Name, tuple[Annotated[int, Field(ge=0)], str]]


def asked_for(data: Path, sources: Mapping[Split, Source], short_side: int | None, shard_bytes: int) -> dict[str, Any]:
    """What shards depend on; folders of images differ by the names, labels, sizes and times of their files."""
    digest, root = hashlib.sha256(), len(os.fspath(data))
    for split, source in sources.items():
        assert isinstance(source, FolderSource)
        digest.update(json.dumps([split, source.class_names]).encode())
        for path, label in zip(source.paths, source.labels.tolist(), strict=True):
            facts = os.stat(path)
            digest.update(f"{label} {facts.st_size} {facts.st_mtime_ns} ".encode() + os.fsencode(path[root:]))
    return {"short_side": short_side, "shard_bytes": shard_bytes, "images": digest.hexdigest()}


def note(folder: Path, asked: Mapping[str, Any]) -> None:
    """Writes FILE, of the files in `folder`."""
    files = {file.name: [file.stat().st_size, sha256(file)] for file in sorted(folder.iterdir())}
    write_json(folder / FILE, {**asked, "files": files})


def must_be_as_noted(folder: Path, name: str) -> None:
    """Holds a small file of a folder of shards against what FILE says of them; where it is not there, nothing is held.

    Raises:
        UserError: it was changed, or FILE is damaged.
    """
    if not os.path.lexists(folder / FILE):
        return
    remedy = f"pack again; or remove {FILE} if the change is meant"
    made = read_json(folder / FILE, Made, remedy, 64 * MEGABYTE)
    if name in made.files and sha256(folder / name) != made.files[name][1]:
        raise UserError(f"{folder / name}: was changed after deit-kd pack; {remedy}")


def is_whole(output: Path, asked: Mapping[str, Any]) -> bool:
    """Whether `output` holds all that is asked for. It does not when it is not there or empty, or when files are missing or cut.

    Raises:
        UserError: it holds something else.
    """
    remedy = "give another --output, or remove it"
    there = f"--output {output}: is there already, and"
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / FILE).exists():
        raise UserError(f"{there} has no {FILE}, which deit-kd pack writes; {remedy}")
    made = read_json(output / FILE, Made, remedy, 64 * MEGABYTE)
    if other := [text for key, text in KEYS.items() if getattr(made, key) != asked[key]]:
        raise UserError(f"{there} holds {' and '.join(other)}; {remedy}")
    if more := sorted({path.name for path in output.iterdir()} - made.files.keys() - {FILE}):
        raise UserError(f"{there} also holds {for_terminal(more[0])}; {remedy}")
    whole = True
    for name, (size, digest) in made.files.items():
        file = output / name
        if not os.path.lexists(file) or (file.is_file() and file.stat().st_size < size):
            whole = False
        elif not file.is_file() or file.stat().st_size > size or sha256(file) != digest:
            raise UserError(f"{there} {name} was changed; {remedy}")
    return whole
