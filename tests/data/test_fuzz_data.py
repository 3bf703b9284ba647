"""Changed and damaged files of data: each is read, or refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deit_kd.data.decode import FORMATS, as_jpeg, decode, decode_image, orientation
from deit_kd.data.sources.base import Source, pixels
from deit_kd.data.sources.catalog import open_source
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.data.sources.folders import CLASS_ORDER, read_class_names
from deit_kd.data.sources.idx import read_idx
from deit_kd.data.sources.pack import pack
from deit_kd.text import printable
from fuzzing import bounded, changed, damaged, json_bytes, survives

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def picture(kind: str, pixels: np.ndarray = PIXELS, **settings: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **settings)
    return stream.getvalue()


def turned(kind: str = "JPEG", way: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = way
    return picture(kind, exif=exif)


PICTURES = [picture(kind) for kind in FORMATS if kind != "DIB"] + [
    turned(),
    turned("PNG"),
    turned("WEBP"),
    picture("JPEG", progressive=True),
    picture("PNG", (PIXELS[..., 0].astype(np.uint16) * 16)),
    picture("TIFF", (PIXELS[..., 0].astype(np.uint16) * 256), compression="tiff_lzw"),
]


def look(source: Source) -> None:
    """Every image as a loader reads it: any exception means there that this image cannot be read."""
    for index in range(min(len(source), 8)):
        assert 0 <= int(source.labels[index]) < len(source.class_names)
        assert source.where(index) == printable(source.where(index))
        with suppress(Exception):
            pixels(source, index)


@bounded
@given(st.sampled_from(PICTURES).flatmap(damaged))
def test_pictures(content: bytes) -> None:
    def read() -> None:
        for way in (decode, as_jpeg, orientation, lambda content: decode_image(content, True)):
            with suppress(Exception):  # the loader says it in one line
                way(content)

    survives(read)


def member(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def tar(entries: list[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def sample(key: str, label: object, kind: str = "cls") -> list[tuple[tarfile.TarInfo, bytes]]:
    text = json.dumps(label) if kind == "json" else str(label)
    return [member(f"{key}.png", PICTURES[FORMATS.index("PNG") - 1]), member(f"{key}.{kind}", text.encode())]


SHARDS = [
    tar(sample("0", 0) + sample("1", 1)),
    tar(sample("a" * 150 + "é", 0) + sample("1", 1)),
    tar(sample("a" * 150, 0), tarfile.GNU_FORMAT),
    tar(sample("0", {"label": 1, "more": [1, {}]}, "json") + sample("1", "dog", "txt")),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzzed")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / "folder" / split / name).mkdir(parents=True)
            (root / "folder" / split / name / "0.png").write_bytes(PICTURES[3])
    pack(root / "folder", root / "shards", None, 1_000_000)
    return root / "shards"


@bounded
@given(content=st.sampled_from(SHARDS).flatmap(damaged))
def test_shards(content: bytes, packed: Path) -> None:
    folder = packed.parent / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text('["cat", "dog"]')
    (folder / "train-0.tar").write_bytes(content)
    survives(lambda: look(open_source("shards", folder, "train")))


@bounded
@given(label=changed({"label": 1, "labels": [0], "more": {"cls": 2}}))
def test_labels_in_json(label: Any, packed: Path) -> None:
    folder = packed.parent / "labels"
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text('["cat", "dog"]')
    text = json.dumps(label).encode("utf-8", "surrogatepass")
    (folder / "train-0.tar").write_bytes(tar([*sample("0", 0)[:1], member("0.json", text)]))
    survives(lambda: look(open_source("shards", folder, "train", label_column="label")))


def npz(columns: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **columns)  # type: ignore[arg-type]
    return stream.getvalue()


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    right = {"shard": [0, 0], "offset": [512, 2560], "size": [100, 200], "labels": [0, 1], "keys": [b"0", b"1"]}
    values = {name: np.asarray(value) for name, value in right.items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(list(right)))
        how = draw(st.sampled_from(["type", "length", "rank", "value", "gone"]))
        if how == "gone":
            values.pop(name, None)
        elif name in values and values[name].size and name != "keys":
            kind = draw(st.sampled_from(["f8", "i1", "u8", "S3", "U3", "c16", "M8[s]", "?", "V4", ">i4"]))
            with np.errstate(all="ignore"):
                values[name] = {
                    "type": lambda value, kind=kind: value.astype(kind) if value.dtype.kind == "i" else value,
                    "length": lambda value: value[:1].repeat(draw(st.sampled_from([0, 1, 3, 2_000_000]))),
                    "rank": lambda value: draw(st.sampled_from([value[None], value.sum() if value.dtype.kind in "iu" else value[:0]])),
                    "value": lambda value: np.asarray([draw(st.sampled_from([-1, 2**31, 2**62, 2**63, 10**6])) for _ in value]),
                }[how](values[name].ravel())  # fmt: skip
    content = npz(values)
    return draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


@bounded
@given(content=indices())
def test_an_index(content: bytes, packed: Path) -> None:
    file = packed / "index_train.npz"
    before = file.read_bytes()
    file.write_bytes(content)
    survives(lambda: look(open_source("shards", packed, "train")))
    file.write_bytes(before)


@bounded
@given(content=st.one_of(json_bytes(["cat", "dog"]), json_bytes({"cat": 1, "dog": 0})))
def test_class_names(content: bytes, packed: Path) -> None:
    file = packed.parent / "names.json"
    file.write_bytes(content)
    survives(lambda: read_class_names(file))
    folder = packed.parent / "folder"
    (folder / CLASS_ORDER).write_bytes(content)
    survives(lambda: look(open_source("image_folder", folder, "val")))
    (folder / CLASS_ORDER).unlink()


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + content


numbers = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 28, 10**6, 2**31 - 1])


@st.composite
def idx_files(draw: st.DrawFn) -> bytes:
    shape = tuple(draw(st.lists(numbers, min_size=0, max_size=4)))
    content = draw(
        st.sampled_from([idx((2, 3, 4), bytes(24)), idx((2,), b"\x00\x01"), idx((2,), b"\x00\x63"), idx(shape, bytes(24))])
    )
    content = draw(damaged(content)) if draw(st.booleans()) else content
    packed = gzip.compress(content) if draw(st.booleans()) else content
    return draw(damaged(packed)) if draw(st.integers(0, 3)) == 0 else packed


@bounded
@given(images=idx_files(), labels=idx_files())
def test_idx(images: bytes, labels: bytes, packed: Path) -> None:
    for suffix in ("", ".gz"):
        files = [packed.parent / f"{name}.idx{suffix}" for name in ("images", "labels")]
        for file, content in zip(files, (images, labels), strict=True):
            file.write_bytes(content)
        survives(lambda files=files: read_idx(*files, 2))  # type: ignore[misc]


@bounded
@given(names=st.lists(st.binary(min_size=1, max_size=8).filter(lambda name: not {0, 47} & set(name)), max_size=3), data=st.data())
def test_folders(names: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = bytes(tmp_path_factory.mktemp("names"))
    make: list[Callable[[bytes], Any]] = [
        lambda path: Path(path.decode("utf-8", "surrogateescape")).write_bytes(PICTURES[3]),
        lambda path: Path(path.decode("utf-8", "surrogateescape") + ".png").write_bytes(PICTURES[3]),
        lambda path: Path(path.decode("utf-8", "surrogateescape")).symlink_to(data.draw(st.sampled_from([".", "..", "../..", "x", "/dev"]))),
        lambda path: Path(path.decode("utf-8", "surrogateescape")).mkdir(),
    ]  # fmt: skip
    for name in names:
        folder = root + b"/" + name
        try:
            Path(folder.decode("utf-8", "surrogateescape")).mkdir()
            for inner in names:
                data.draw(st.sampled_from(make))(folder + b"/" + inner)
        except OSError:  # . and .., a name that is there
            continue
    survives(lambda: look(FolderSource(Path(root.decode()))))
