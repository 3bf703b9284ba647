"""Packs the pictures of an image folder into tar shards."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from deit_kd.data.decode import ORIENTATION, decode_image, orientation, read_picture
from deit_kd.data.sources import packed
from deit_kd.data.sources.base import Split
from deit_kd.data.sources.catalog import open_source
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.data.sources.shards import INDEX
from deit_kd.errors import UserError
from deit_kd.files.atomic import write_json
from deit_kd.files.outputs import must_not_be_data, replace, workspace


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
