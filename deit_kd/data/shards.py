"""Images in tar shards, in WebDataset's layout, read by index: the stream of a run is that of the folder that they were packed from."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from tqdm import tqdm

from deit_kd.data.decode import decode_image
from deit_kd.data.sources import FolderSource, Source, Split, open_source
from deit_kd.errors import UserError

INDEX = "index_{split}.npz"  # where each image lies; made by `pack`, and by reading the shards through where it is not there


class ShardSource:
    """DIR/SPLIT-XXXXXX.tar with KEY.jpg (any format that Pillow reads) and KEY.cls (the label's number) for each image.

    Args:
        root: the folder of the shards, with classes.json, the list of class names.
        split: which shards.

    Raises:
        UserError: shards are missing, cut off, or not of this layout.
    """

    def __init__(self, root: Path, split: Split):
        self.files = sorted(root.glob(f"{split}-*.tar"))
        if not self.files:
            raise UserError(f"{root}: has no {split}-*.tar; make shards of a folder of images with deit-kd pack")
        try:
            self.class_names = tuple(json.loads((root / "classes.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{root}/classes.json: cannot be read ({error}); it holds the list of class names") from None
        index = root / INDEX.format(split=split)
        try:
            found = dict(np.load(index, allow_pickle=False)) if index.exists() else _read_through(self.files)
            self.shard, self.offset, self.size, self.labels, self.keys = (
                found[name] for name in ("shard", "offset", "size", "labels", "keys")
            )
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            raise UserError(f"{index}: is damaged ({error}); remove it, and the shards are read through instead") from None
        for number, file in enumerate(self.files):
            ends = (self.offset + self.size)[self.shard == number]
            if len(ends) == 0 or ends.max() > file.stat().st_size:
                raise UserError(f"{file}: is cut off, or not the shard that {index.name} describes; copy or pack it again")
        if self.shard.max() >= len(self.files) or self.labels.max() >= len(self.class_names) or self.labels.min() < 0:
            raise UserError(f"{root}: shards or classes are missing that {index.name} describes; copy or pack it again")
        self.name, self.origin = f"images of {len(self.class_names)} classes in {len(self.files)} shards", str(root)
        self._open: dict[int, int] = {}  # descriptors; a worker process inherits them, and reads at positions of its own

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:  # noqa: D102
        return f"{self.files[self.shard[index]]}:{self.keys[index].decode()}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.encoded(index)), int(self.labels[index])

    def encoded(self, index: int) -> bytes:  # noqa: D102
        shard = int(self.shard[index])
        if shard not in self._open:
            self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
        return os.pread(self._open[shard], int(self.size[index]), int(self.offset[index]))


def _read_through(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """The index of shards that came without one: images of each shard in their order, with the label of the same key."""
    rows: list[tuple[int, int, int, int, bytes]] = []
    for number, file in enumerate(tqdm(files, "reading shards through", unit="shard", delay=2, disable=None)):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    key, _, extension = member.name.rpartition(".")
                    if extension == "cls":
                        content = tar.extractfile(member)
                        labels[key] = int(content.read()) if content else -1
                    elif f".{extension.lower()}" in Image.registered_extensions():
                        images[key] = member
        except (tarfile.TarError, ValueError, OSError) as error:
            raise UserError(f"{file}: cannot be read as a shard ({error}); copy or pack it again") from None
        if missing := images.keys() - labels.keys():
            raise UserError(f"{file}: {min(missing)} has no .cls beside it; a shard holds KEY.jpg and KEY.cls for each image")
        rows += [(number, member.offset_data, member.size, labels[key], key.encode()) for key, member in images.items()]
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return dict(zip(("shard", "offset", "size", "labels", "keys"), map(np.asarray, columns), strict=True))


def open_shards(data: Path | None, split: Split) -> Source:
    """The source `shards`."""
    if data is None:
        raise UserError("data.source=shards needs a folder: pass --data DIR, made by deit-kd pack")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such directory")
    return ShardSource(data, split)


def pack(data: Path, output: Path, short_side: int | None, shard_bytes: int) -> None:
    """Writes the shards of an image folder's two splits: whole, or not at all.

    Args:
        data: as `image_folder` takes it.
        output: a folder that is not there yet.
        short_side: pixels to which larger images are shrunk, as JPEG of quality 95; None copies the files as they are.
        shard_bytes: where a shard ends.

    Raises:
        UserError: `output` is there, or an image that is to be shrunk cannot be read.
    """
    if output.exists():
        raise UserError(f"--output {output}: is there already; give another, or remove it")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        splits: tuple[Split, Split] = ("train", "val")
        for split in splits:
            source = open_source("image_folder", data, split)
            assert isinstance(source, FolderSource)
            (temporary / "classes.json").write_text(json.dumps(list(source.class_names)))
            _write_split(source, split, temporary, short_side, shard_bytes)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
            yield label, key, extension, Path(path).read_bytes()
            continue
        try:
            image, _ = source[index]
        except Exception as error:  # PIL raises many types for broken files
            raise UserError(f"{path}: cannot be read ({error}); remove it, or pack without --short-side") from None
        scale = short_side / min(image.size)
        if scale >= 1:
            yield label, key, extension, Path(path).read_bytes()
            continue
        stream = io.BytesIO()
        size = round(image.width * scale), round(image.height * scale)
        image.resize(size, Image.Resampling.BICUBIC).save(stream, "jpeg", quality=95)
        yield label, key, "jpg", stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without owner or time: packed twice, the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
