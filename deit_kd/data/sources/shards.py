"""Images in tar shards, in WebDataset's layout, read by index: the stream of a run is that of the folder that they were packed from."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from deit_kd.data.decode import ORIENTATION, decode_image, orientation, read_picture
from deit_kd.data.sources import folders, packed, shard_index
from deit_kd.data.sources.catalog import Source, Split, open_source
from deit_kd.data.sources.folder_source import FileSource, FolderSource
from deit_kd.errors import UserError
from deit_kd.files.outputs import must_not_be_data, replace, workspace
from deit_kd.files.whole import warn, write_json
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
            self.left_out = folders.told(left_out)
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


def pack(data: Path, output: Path, short_side: int | None, shard_bytes: int) -> bool:
    """Writes the shards of an image folder's two splits: whole, or not at all.

    Args:
        data: as `image_folder` takes it.
        output: a folder to make; shards that this command made of these images are kept.
        short_side: pixels to which larger images are shrunk, as JPEG of quality 95; None copies the files as they are.
        shard_bytes: where a shard ends.

    Returns:
        Whether all of it was there already.

    Raises:
        UserError: `output` holds something else, or an image that is to be shrunk cannot be read.
    """
    must_not_be_data(output, data)
    splits: tuple[Split, Split] = ("train", "val")
    sources = {split: open_source("image_folder", data, split) for split in splits}
    asked = packed.asked_for(data, sources, short_side, shard_bytes)
    with workspace(output, "deit-kd pack") as made:
        if packed.is_whole(output, asked):
            return True
        made.mkdir()
        for split, source in sources.items():
            assert isinstance(source, FolderSource)
            write_json(made / "classes.json", list(source.class_names), None)
            _write_split(source, split, made, short_side, shard_bytes)
        packed.note(made, asked)
        replace(made, output)
    return False


def _write_split(source: FolderSource, split: Split, folder: Path, short_side: int | None, shard_bytes: int) -> None:
    rows: list[tuple[int, int, int, int, bytes]] = []
    samples = iter(tqdm(_samples(source, short_side), f"packing {split}", len(source), unit="image", delay=2, disable=None))
    for shard in itertools.count():
        first = next(samples, None)
        if first is None:
            break
        with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for label, key, extension, content in itertools.chain([first], samples):
                _add(tar, f"{key}.{extension}", content)
                rows.append((shard, tar.offset - -(-len(content) // 512) * 512, len(content), label, key.encode()))
                _add(tar, f"{key}.cls", str(label).encode())
                if tar.offset >= shard_bytes:
                    break
    names = ("shard", "offset", "size", "labels", "keys")
    columns: dict[str, Any] = dict(zip(names, map(np.asarray, zip(*rows, strict=True)), strict=True))
    np.savez_compressed(folder / INDEX.format(split=split), **columns)


def _samples(source: FolderSource, short_side: int | None) -> Iterator[tuple[int, str, str, bytes]]:
    """(label, key, extension, bytes) in the source's order."""
    for index, path in enumerate(source.paths):
        label, key = int(source.labels[index]), f"{index:08d}"
        extension = path.rpartition(".")[2].lower()
        if short_side is None:
            yield label, key, extension, read_picture(path)
            continue
        try:
            content = read_picture(path)
            image, turn = decode_image(content), orientation(content)
        except Exception as error:  # PIL raises many types for broken files
            raise UserError(f"{path}: cannot be read ({error}); remove it, or pack without --short-side") from None
        scale = short_side / min(image.size)
        if scale >= 1:
            yield label, key, extension, content
            continue
        kept: dict[str, Any] = {}
        if turn != 1:  # so that data.exif_orientation means here what it means of the folder
            kept["exif"] = exif = Image.Exif()
            exif[ORIENTATION] = turn
        stream = io.BytesIO()
        size = round(image.width * scale), round(image.height * scale)
        image.resize(size, Image.Resampling.BICUBIC).save(stream, "jpeg", quality=95, **kept)
        yield label, key, "jpg", stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without owner or time: packed twice, the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
