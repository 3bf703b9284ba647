"""Images in tar shards, in WebDataset's layout, read by index: the stream of a run is that of the folder that they were packed from."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from deit_kd.data.sources import folders, packed, shard_index
from deit_kd.data.sources.base import Source, Split
from deit_kd.data.sources.folder_source import FileSource
from deit_kd.errors import UserError
from deit_kd.files.warn import warn
from deit_kd.text import for_terminal

INDEX = "index_{split}.npz"  # where each image lies; made by `pack`, and by reading the shards through where it is not there
MOST_OPEN = 16  # files: descriptors are few, and a run reads from all shards in turn


class ShardSource(FileSource):
    """DIR/SPLIT-XXXXXX.tar with KEY.jpg (a format of `decode.FORMATS`) and KEY.cls (the label's number) for each image.

    Args:
        root: the folder of the shards, with classes.json, the class names.
        split: which shards.
        label_column: see `shard_index.read_through`.

    Raises:
        UserError: shards are missing, cut off, or not of this layout.
    """

    def __init__(self, root: Path, split: Split, label_column: str | None = None):
        self.files = sorted(root.glob(f"{split}-*.tar"))
        if not self.files:
            raise UserError(f"{root}: has no {split}-*.tar; make shards of a folder of images with deit-kd pack")
        self.class_names = folders.read_class_names(root / "classes.json")
        packed.must_be_as_noted(root, "classes.json")
        index = root / INDEX.format(split=split)
        self._noted = index.exists() and label_column is None
        if self._noted:
            found = shard_index.load(index, self.files, len(self.class_names))
            packed.must_be_as_noted(root, index.name)
        else:
            found, left_out = shard_index.read_through(self.files, self.class_names, label_column)
            self.left_out = folders.in_words(left_out)
            if set(left_out) - {folders.HIDDEN}:
                warn(f"{root}: left out of the {split} shards are {self.left_out}")
        self.shard, self.offset, self.size, self.labels, self.keys = found
        self.name, self.origin = f"images of {len(self.class_names)} classes in {len(self.files)} shards", str(root)
        self._open: dict[int, io.FileIO] = {}  # the last few files that were read, the latest last; positions are not shared

    def where(self, index: int) -> str:  # noqa: D102
        return for_terminal(f"{self.files[self.shard[index]]}:{self.keys[index].decode('utf-8', 'replace')}")

    def encoded(self, index: int) -> bytes:  # noqa: D102
        shard, size = int(self.shard[index]), int(self.size[index])
        file = self._open.pop(shard, None) or io.FileIO(self.files[shard])
        self._open[shard] = file
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        if self._noted:
            place, label = int(self.offset[index]), int(self.labels[index])
            return shard_index.read_noted(file.fileno(), place, size, label, bytes(self.keys[index]))
        content = os.pread(file.fileno(), size, int(self.offset[index]))
        if len(content) < size:
            raise OSError(f"the shard ends within the image, after {len(content):,} of {size:,} bytes")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a process that is not forked opens its own


def open_shards(data: Path | None, split: Split, label_column: str | None = None) -> Source:
    """The source `shards`."""
    if data is None:
        raise UserError("data.source=shards needs a folder: pass --data DIR, made by deit-kd pack")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such directory")
    return ShardSource(data, split, label_column)
