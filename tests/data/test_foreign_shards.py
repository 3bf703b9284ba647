"""Shards and tables of others: WebDataset's names, labels as text and JSON, faults named as what they are, few open files."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from deit_kd import recipe as recipes
from deit_kd.data import open_source
from deit_kd.data.on_device.augment import OnDevice, choose_augmentation
from deit_kd.data.sources import shards
from deit_kd.data.sources.hf_datasets import open_rows
from deit_kd.data.sources.pack import pack
from deit_kd.errors import UserError

Member = tuple[str, bytes]


def png(channel: int) -> bytes:
    """Brightest in a channel."""
    pixels = np.random.default_rng(channel).integers(0, 80, (8, 8, 3), dtype=np.uint8)
    pixels[..., channel] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def tar(path: Path, members: Iterable[Member | tarfile.TarInfo], **settings: Any) -> None:
    with tarfile.open(path, "w", **settings) as archive:
        for each in members:
            if isinstance(each, tarfile.TarInfo):
                archive.addfile(each)
                continue
            info = tarfile.TarInfo(each[0])
            info.size = len(each[1])
            archive.addfile(info, io.BytesIO(each[1]))


def folder(root: Path, sample: Callable[[str, int], list[Member | tarfile.TarInfo]], classes: Any = ("cat", "dog")) -> Path:
    root.mkdir()
    (root / "classes.json").write_text(json.dumps(classes))
    for split in ("train", "val"):
        tar(root / f"{split}-000000.tar", [member for n in range(4) for member in sample(f"{n:05d}", n % 2)])
    return root


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD: dict[str, Callable[[str, int], list[Any]]] = {
    "number": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.cls", f" {y}\n".encode())],
    "name": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.cls", ("cat", "dog")[y].encode())],
    "text": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.txt", ("cat", "dog")[y].encode())],
    "json": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.json", json.dumps({"label": y, "width": 8}).encode())],
    "json of a name": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.json", json.dumps({"cls": ("cat", "dog")[y]}).encode())],
    "json of a number": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.json", str(y).encode())],
    "captions beside": lambda key, y: [
        (f"{key}.png", png(y)), (f"{key}.txt", b"a photo of a cat"), (f"{key}.json", b'{"url": "x"}'), (f"{key}.cls", str(y).encode()),
    ],
    "mask": lambda key, y: [(f"{key}.png", png(y)), (f"{key}.seg.png", png(2)), (f"{key}.cls", str(y).encode())],
    "mask before": lambda key, y: [(f"{key}.cls", str(y).encode()), (f"{key}.seg.png", png(2)), (f"{key}.PNG", png(y))],
    "AppleDouble": lambda key, y: [
        (f"._{key}.png", b"\0\5\26\7"), (f"{key}.png", png(y)), (f"._{key}.cls", b"\0\5\26\7"), (f"{key}.cls", str(y).encode()),
    ],
    "hidden folders": lambda key, y: [
        (f"__MACOSX/{key}.png", png(2)), (f".x/{key}.png", png(2)), (f"{key}.png", png(y)), (f"{key}.cls", str(y).encode()),
    ],
    "in folders": lambda key, y: [(f"./a.b/{key}.png", png(y)), (f"./a.b/{key}.cls", str(y).encode())],
    "links": lambda key, y: [
        (f"{key}.png", png(y)), (f"{key}.cls", str(y).encode()), link(f"s{key}.png", f"{key}.png"), link(f"self{key}.cls", f"self{key}.cls"),
        link(f"h{key}.png", f"{key}.png", tarfile.LNKTYPE), link("fifo.png", "", tarfile.FIFOTYPE),
    ],
    "long names": lambda key, y: [(f"{'n' * 180}é{key}.png", png(y)), (f"{'n' * 180}é{key}.cls", str(y).encode())],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(GOOD))
def test_layouts_of_others(kind: str, tmp_path: Path) -> None:
    source = open_source("shards", folder(tmp_path / "s", GOOD[kind]), "train")
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert [int(np.asarray(source[n][0]).mean((0, 1)).argmax()) for n in range(4)] == [0, 1, 0, 1]
    assert ("seg.png" in source.left_out) == kind.startswith("mask")
    assert (".links" in source.left_out or "links and special" in source.left_out) == (kind == "links")


@pytest.mark.parametrize("classes", [["cat", "dog"], {"dog": 1, "cat": 0}, {"cat": 0, "dog": 1}])
def test_classes_go_by_their_index(classes: Any, tmp_path: Path) -> None:
    source = open_source("shards", folder(tmp_path / "s", GOOD["number"], classes), "train")
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"cat": 1, "dog": 2}, "indices are not 0 to 1, each once"),
        ({"cat": 0, "dog": 0}, "indices are not 0 to 1"),
        ({"cat": True, "dog": 0}, "must be an integer"),
        (["cat", 1], "1: must be text"),
        (["cat", "cat"], "'cat' is there twice"),
        ([], "there is none"),
        ("cat", "must be a list"),
        (None, "must be a list"),
        ([["cat"]], "0: must be text"),
    ],
)
def test_classes_that_are_none(classes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_source("shards", folder(tmp_path / "s", GOOD["number"], classes), "train")


def labeled(label: bytes, kind: str = "cls") -> Callable[[str, int], list[Any]]:
    return lambda key, _: [(f"{key}.png", png(0)), (f"{key}.{kind}", label)]


BAD: dict[str, tuple[Callable[[str, int], list[Any]], str]] = {
    "two pictures": (
        lambda key, _: [(f"{key}.jpg", png(0)), (f"{key}.png", png(1)), (f"{key}.cls", b"0")],
        r"a key has two pictures, 00000.jpg and 00000.png",
    ),
    "beyond": (labeled(b"2"), "00000: .cls: label 2 is none of the 2 classes of classes.json, 0 to 1"),
    "far beyond": (labeled(b"1000000000"), ".cls holds '1000000000'; needed is a number from 0 to 1"),
    "below": (labeled(b"-1"), ".cls holds '-1'; needed is a number from 0 to 1"),
    "long": (labeled(b"9" * 100_000), r".cls holds '9+\.\.\.; needed is a number"),
    "no number": (labeled(b"\xff\x00"), ".cls holds"),
    "empty": (labeled(b""), ".cls holds ''"),
    "no such class": (labeled(b"bird", "txt"), ".txt holds 'bird'; needed is a number from 0 to 1, or the name of a class"),
    "float": (labeled(b'{"label": 1.5}', "json"), "label of .json holds 1.5"),
    "true": (labeled(b'{"label": true}', "json"), "label of .json holds True"),
    "list": (labeled(b'{"label": [1]}', "json"), r"label of .json holds \[1\]"),
    "other keys": (labeled(b'{"category": 1}', "json"), r"has the keys \['category'\], not label or .*data.label_column=KEY"),
    "two keys": (
        labeled(b'{"label": 1, "fine_label": 0}', "json"),
        "several labels, label, fine_label; choose .*data.label_column=label",
    ),
    "deep": (labeled(b"[" * 100_000, "json"), ".json: cannot be read"),
    "no JSON": (labeled(b"{", "json"), ".json: cannot be read"),
    "no label": (lambda key, _: [(f"{key}.png", png(0))], "00000: has no .cls beside it"),
    "no picture": (
        lambda key, y: [(f"{key}.cls", b"0"), (f"{key}.rgb.png", png(y))],
        "no shard has a picture KEY.jpg beside its label",
    ),
    "large label": (labeled(bytes(1_000_001)), "has 1,000,001 bytes, which is no label"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_faults_of_layout_are_told_as_such(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=BAD[kind][1]) as raised:
        open_source("shards", folder(tmp_path / "s", BAD[kind][0]), "train")
    assert "index_" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_label_is_chosen_by_a_key(tmp_path: Path) -> None:
    def sample(key: str, y: int) -> list[Any]:
        return [(f"{key}.png", png(y)), (f"{key}.cls", b"0"), (f"{key}.json", json.dumps({"coarse": 0, "fine": y}).encode())]

    root = folder(tmp_path / "s", sample)
    assert open_source("shards", root, "train").labels.tolist() == [0, 0, 0, 0]
    assert open_source("shards", root, "train", label_column="fine").labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"has the keys \['coarse', 'fine'\], not color"):
        open_source("shards", root, "train", label_column="color")
    with pytest.raises(UserError, match="data.label_column=fine: image_folder has no columns"):
        open_source("image_folder", root, "train", label_column="fine")


def damage(content: bytes, kind: str) -> bytes:
    if kind == "pax bomb":  # an extended header that declares 4 GB
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, 4_000_000_000
        return info.tobuf(tarfile.GNU_FORMAT) + content
    if kind == "negative size":  # Python before 2025-08 goes round for ever
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("0.png")
            info.pax_headers = {"size": "-1536"}
            archive.addfile(info, io.BytesIO())
        return stream.getvalue()
    if kind == "headers of headers":
        info = tarfile.TarInfo("x")
        info.type = tarfile.XHDTYPE
        return info.tobuf() * 3000 + content
    if kind == "gzip":
        import gzip

        return gzip.compress(content)
    if kind == "cut":
        return content[: len(content) // 2 + 100]
    if kind == "header":
        return content[:2050] + bytes([content[2050] ^ 1]) + content[2051:]
    return {"empty": b"", "zeros": bytes(10240), "text": b"no tar at all" * 100}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pax bomb", "cannot be read as a shard"),
        ("negative size", "cannot be read as a shard|no shard has a picture"),
        ("headers of headers", "cannot be read as a shard"),
        ("gzip", "is compressed by gzip, so that no image can be read alone; unpack it with gunzip"),
        ("cut", "cannot be read as a shard"),
        ("header", r"cannot be read as a shard \(.*\)"),
        ("empty", "cannot be read as a shard"),
        ("zeros", "no shard has a picture"),
        ("text", "cannot be read as a shard"),
    ],
)
def test_damaged_tars(kind: str, message: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "s", GOOD["number"])
    file = root / "train-000000.tar"
    file.write_bytes(damage(file.read_bytes(), kind))
    with pytest.raises(UserError, match=message) as raised:
        open_source("shards", root, "train")
    assert "index_" not in str(raised.value)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="is no regular file"):
        open_source("shards", root, "train")


def test_a_sparse_member_is_no_picture(tmp_path: Path) -> None:
    """Its bytes in the tar are not those of the file."""
    root = folder(tmp_path / "s", GOOD["number"])
    info = tarfile.TarInfo("9.png")
    info.size = 512
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % 1_000_000
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    content = (root / "train-000000.tar").read_bytes()
    (root / "train-000000.tar").write_bytes(bytes(block) + bytes(512) + content)
    source = open_source("shards", root, "train")
    assert len(source) == 4
    assert "links and special members" in source.left_out


INDEX = {"shard": [0, 0], "offset": [512, 2560], "size": [100, 200], "labels": [0, 1], "keys": [b"0", b"1"]}


def header(shape: str, kind: str = "<i8") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("labels", [0.0, 1.0], "labels: is an array of"),
        ("labels", [[0, 1]], "labels: is an array of .* with 2 dimensions"),
        ("labels", [0, 1, 1], "columns differ in length"),
        ("labels", 0, "with 0 dimensions"),
        ("labels", ["a", "b"], "labels: is an array of"),
        ("labels", [True, False], "labels: is an array of"),
        ("labels", [0, -1], "numbers below 0"),
        ("labels", [0, 2], "shards or classes are missing"),
        ("shard", [0, 7], "shards or classes are missing"),
        ("offset", [512, 2**60], "is cut off, or not the shard"),
        ("offset", np.array([512, 2**64 - 1], np.uint64), "numbers beyond"),
        ("size", [2**62, 1], "numbers beyond"),
        ("keys", [0, 1], "keys: is an array of"),
        ("keys", None, "is damaged"),
        ("keys", header("(2,)", "|O") + b"\x80\x04N.", "is damaged"),
        ("size", header("(1000000000,)") + bytes(100), "1,000,000,000 entries, the shards have room for"),
        ("size", header("(-5,)"), "is damaged"),
        ("size", header("(2,)") + bytes(100_000_000), "is damaged"),
        ("size", header("(2,)") + bytes(8), "size: is cut off|is damaged"),
        ("size", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_000, "is damaged"),
    ],
)
def test_an_index_is_held_against_the_shards(column: str, value: Any, message: str, tmp_path: Path) -> None:
    import zipfile

    root = folder(tmp_path / "s", GOOD["number"])
    columns = {**INDEX, column: value}
    with zipfile.ZipFile(root / "index_train.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in columns.items():
            stream = io.BytesIO()
            if isinstance(values, bytes):
                stream.write(values)
            elif values is not None:
                np.save(stream, np.asarray(values))
            else:
                continue
            archive.writestr(f"{name}.npy", stream.getvalue())
    with pytest.raises(UserError, match=message) as raised:
        open_source("shards", root, "train")
    assert "\n" not in str(raised.value)


def test_a_tar_without_its_end_or_joined_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "s", GOOD["number"])
    file = root / "train-000000.tar"
    whole = file.read_bytes()
    file.write_bytes(whole + whole)
    assert len(open_source("shards", root, "train")) == 4
    assert "holds more behind the mark of its end" in capsys.readouterr().err
    end = whole.rstrip(b"\0")
    file.write_bytes(whole[: -(-len(end) // 512) * 512])
    assert len(open_source("shards", root, "train")) == 4
    assert "has no mark of its end" in capsys.readouterr().err


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """40 shards of 2 images."""
    root = tmp_path / "many"
    for name in ("a", "b"):
        for split, count in (("train", 40), ("val", 1)):
            (root / "folder" / split / name).mkdir(parents=True)
            for number in range(count):
                (root / "folder" / split / name / f"{number:03d}.png").write_bytes(png(number % 3))
    pack(root / "folder", root / "shards", None, 2048)
    assert len(list((root / "shards").glob("train-*.tar"))) >= 40
    return root


def descriptors() -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return [each for each in found if each.endswith(".tar")]


def test_few_files_are_open_and_a_spawned_worker_opens_its_own(many: Path) -> None:
    source, theirs = open_source("shards", many / "shards", "train"), open_source("image_folder", many / "folder", "train")
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    for index in order:
        assert source.encoded(index) == theirs.encoded(index)
        assert len(descriptors()) <= shards.MOST_OPEN
    copy = pickle.loads(pickle.dumps(source))  # as spawn sends it: a descriptor's number would be another file there
    assert len(descriptors()) <= shards.MOST_OPEN
    for index in order[:20]:
        assert copy.encoded(index) == theirs.encoded(index)
    (many / "shards" / source.files[0].name).write_bytes(b"")
    with pytest.raises(OSError, match="the shard ends within the image"):
        open_source("shards", many / "shards", "val").__class__.encoded(pickle.loads(pickle.dumps(source)), 0)


@pytest.mark.parametrize(
    ("policy", "where"),
    [("rand-m9-mstd0.5-inc1", "cpu"), ("rand-m9-mstd0.5-inc1", "device"), ("3a", "cpu"), ("3a", "device"), ("augmix-m3-w3", "cpu"),
     ("original", "cpu"), ("null", "cpu"), ("null", "device")],
)  # fmt: skip
def test_what_workers_get_can_be_pickled(policy: str, where: str) -> None:
    recipe = recipes.load("quickstart", [f"augmentation.auto_augment={policy}", f"run.augment_on={where}"])
    chosen = choose_augmentation(recipe.data, recipe.augmentation, recipe.run, torch.device("cpu"))
    transform = chosen.worker if isinstance(chosen, OnDevice) else chosen
    copy, image = pickle.loads(pickle.dumps(transform)), Image.new("RGB", (40, 40), (200, 100, 50))
    read = torch.from_numpy(np.array(image)).permute(2, 0, 1) if isinstance(chosen, OnDevice) else image
    results = []
    for each in (transform, copy):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        made = each(read)
        results.append(made if isinstance(made, torch.Tensor) else made.image)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(kinds: dict[str, Any], **columns: list[Any]) -> Path:
        rows = {"image": [{"bytes": png(n % 2), "path": None} for n in range(len(next(iter(columns.values()))))], **columns}
        features = datasets.Features({"image": datasets.Image(), **kinds})
        for split in ("train", "val"):
            datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
        return tmp_path / "{split}.parquet"

    return write


def test_tables_with_two_labels(table: Callable[..., Path]) -> None:
    two = {"fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["x"])}
    data = table(two, fine=[0, 1, 0, 1], coarse=[0, 0, 0, 0])
    with pytest.raises(UserError, match="has the labels fine and coarse; choose with data.label_column=fine"):
        open_rows(data, "train")
    with pytest.raises(UserError, match=r"data.label_column=fin: no such column; there are image \(.*\), fine \(int64\)"):
        open_source("hf_datasets", data, "train", label_column="fin")
    assert open_source("hf_datasets", data, "train", label_column="fine").class_names == ("a", "b")
    assert open_source("hf_datasets", data, "val", label_column="coarse").labels.tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="needed are whole numbers"):
        open_source("hf_datasets", data, "train", label_column="image")


def test_labels_beyond_the_declared_classes(table: Callable[..., Path]) -> None:
    data = table({"label": datasets.ClassLabel(names=["a", "b"])}, label=[0, 1, 0, 1])
    file = data.parent / "train.parquet"
    rows = parquet.read_table(file)
    rows = rows.set_column(1, rows.schema.field("label"), pyarrow.array([0, 1, 2, 1], pyarrow.int64()))
    parquet.write_table(rows, file)
    with pytest.raises(UserError, match="label 2 is none of the 2 classes that are declared"):
        open_rows(data, "train")


def test_a_row_without_an_image_is_one_bad_image(table: Callable[..., Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    data = table({"label": datasets.Value("int64")}, label=[0, 1, 0])
    for split in ("train", "val"):
        rows = parquet.read_table(data.parent / f"{split}.parquet")
        cells = [None, {"bytes": None, "path": None}, {"bytes": None, "path": str(tmp_path / "fifo")}]
        rows = rows.set_column(0, rows.schema.field("image"), pyarrow.array(cells, rows.schema.field("image").type))
        parquet.write_table(rows, data.parent / f"{split}.parquet")
    source = open_rows(data, "train")
    for index, reason in enumerate(("the row has no image", "the row has no image", "is no regular file")):
        with pytest.raises(ValueError, match=reason):
            source[index]


def test_labels_of_tables_are_held_against_their_classes(table: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="labels go up to 1,000,000; count them from 0 without gaps"):
        open_rows(table({"label": datasets.Value("int64")}, label=[0, 1, 2, 10**9]), "train")
    data = table(
        {"label": datasets.Value("int64"), "other": datasets.Sequence(datasets.Value("int64"))}, label=[0, 1] * 2, other=[[1]] * 4
    )
    assert open_rows(data, "train").labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match="labels are list"):
        open_rows(data, "train", "other")


def of_one(members: Callable[[str], list[Member]], classes: list[str], root: Path) -> list[int]:
    return open_source(
        "shards", folder(root, lambda key, y: [(f"{key}.png", png(0)), *members(key)], classes), "train"
    ).labels.tolist()


@pytest.mark.parametrize(
    ("kind", "label"), [("txt", b"1"), ("txt", b" 1\n"), ("json", b'{"label": "1"}'), ("json", b'"1"'), ("json", b'{"cls": "1"}')]
)
def test_a_text_of_digits_that_is_the_name_of_a_class_is_that_class(kind: str, label: bytes, tmp_path: Path) -> None:
    """Class names 1, 2, 0: the text 1 is class 0, the number 1 class 1."""
    assert of_one(lambda key: [(f"{key}.{kind}", label)], ["1", "2", "0"], tmp_path / "s") == [0] * 4
    assert of_one(lambda key: [(f"{key}.json", b'{"label": 1}')], ["1", "2", "0"], tmp_path / "n") == [1] * 4


def test_digits_that_may_be_a_number_or_a_name(tmp_path: Path) -> None:
    names = ["1", "2", "0"]
    with pytest.raises(UserError, match=r"\.cls holds 1, which may be the class named 1 \(number 0\) or class number 1;"):
        of_one(lambda key: [(f"{key}.cls", b"1")], names, tmp_path / "a")
    numbers = of_one(lambda key: [(f"{key}.cls", str(int(key) % 3).encode())], ["1", "2", "3"], tmp_path / "b")  # 0 is no name
    assert numbers == [0, 1, 2, 0]
    with pytest.raises(UserError, match=r"\.txt holds 1, which may be the class named 1 .*, and 0 names none"):
        of_one(lambda key: [(f"{key}.txt", str(int(key) % 3).encode())], ["1", "2", "3"], tmp_path / "c")
    assert of_one(lambda key: [(f"{key}.cls", str(int(key) % 3).encode())], ["0", "1", "2"], tmp_path / "d") == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([("cls", b"0"), ("cls", b"1")], "two labels of one kind, 00000.cls and 00000.cls"),
        ([("cls", b"0"), ("CLS", b"0")], "two labels of one kind, 00000.cls and 00000.CLS"),
        ([("json", b"0"), ("json", b"0")], "two labels of one kind, 00000.json and 00000.json"),
        (
            [("cls", b"0"), ("json", b'{"label": 1}')],
            r"00000: .cls says class 0, label of .json says class 1; .*data.label_column=cls",
        ),
        ([("cls", b"0"), ("txt", b"dog")], r".cls says class 0, .txt says class 1"),
        ([("json", b'{"label": "cat"}'), ("txt", b"dog")], r"label of .json says class 0, .txt says class 1; .*label_column=label"),
        ([("cls", b"cat"), ("json", b"1")], r".cls says class 0, .json says class 1"),
    ],
)
def test_labels_that_contradict_each_other(labels: list[Member], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        of_one(lambda key: [(f"{key}.{kind}", label) for kind, label in labels], ["cat", "dog"], tmp_path / "s")


def test_what_does_not_contradict_a_label(tmp_path: Path) -> None:
    for number, beside in enumerate(
        (b'{"label": 0}', b'{"label": "bird"}', b"{", b'{"label": 1, "fine_label": 0}', b'{"other": 1}')
    ):
        own = partial(lambda beside, key: [(f"{key}.cls", b"0"), (f"{key}.json", beside), (f"{key}.txt", b"a dog")], beside)
        assert of_one(own, ["cat", "dog"], tmp_path / f"{number}") == [0] * 4
    root = folder(
        tmp_path / "chosen", lambda key, y: [(f"{key}.png", png(0)), (f"{key}.cls", b"0"), (f"{key}.json", b'{"label": 1}')]
    )
    assert open_source("shards", root, "train", label_column="label").labels.tolist() == [1] * 4
    root = folder(
        tmp_path / "file", lambda key, y: [(f"{key}.png", png(0)), (f"{key}.cls", b"0"), (f"{key}.json", b'{"label": 1}')]
    )
    assert open_source("shards", root, "train", label_column="cls").labels.tolist() == [0] * 4
