"""Folders of others: what counts as a picture of a class, what is left out, and which label a class has."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from deit_kd import recipe as recipes
from deit_kd.data import open_source
from deit_kd.data.build import open_data
from deit_kd.data.sources import folder_source, folders
from deit_kd.data.sources.catalog import open_folder_to_evaluate
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.data.sources.idx import read_idx
from deit_kd.errors import UserError
from deit_kd.evaluation.imagenet_benchmarks import open_benchmark
from deit_kd.evaluation.report import match_labels
from deit_kd.models import build, load_teacher

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde\x00\x00\x00\x0cIDAT"
    b"x\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)


def make(root: Path, *names: str, content: bytes = PNG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of folders and teachers."""
    lines: list[str] = []
    monkeypatch.setattr(folder_source, "warn", lines.append)
    monkeypatch.setattr(build, "warn", lines.append)
    return lines


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make(tmp_path / "data", "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.jpg")


def names_of(source: FolderSource, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in source.paths]


RIGHT = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.jpg"]


@pytest.mark.parametrize(
    "hidden",
    [
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "cat/.AppleDouble/0.png",
        "__MACOSX/cat/._0.png",
        "cat/._0.png",
        ".git/objects/x.png",
        "dog/Thumbs.db",
        "dog/deep/.thumbnails/x.jpg",
        "$RECYCLE.BIN/x/0.png",
        "System Volume Information/0.png",
        "#recycle/cat/0.png",
        "desktop.ini",
    ],
)
def test_hidden_and_system_files_are_no_pictures(hidden: str, plain: Path, said: list[str]) -> None:
    source = FolderSource(make(plain, hidden))
    assert names_of(source, plain) == RIGHT
    assert source.class_names == ("cat", "dog")
    assert source.left_out == f"1 {folders.HIDDEN}"
    assert said == []


def test_links_back_are_read_once_and_links_elsewhere_followed(plain: Path, tmp_path: Path, said: list[str]) -> None:
    (plain / "cat/self").symlink_to(".")
    (plain / "cat/up").symlink_to("..")
    (plain / "cat/far").symlink_to(tmp_path)
    (plain / "again").symlink_to(".")
    (plain / "circle").symlink_to("circle")
    source = FolderSource(plain)
    assert names_of(source, plain) == RIGHT
    assert source.left_out == "4 links that lead back, 1 beside the class folders"
    elsewhere = make(tmp_path / "elsewhere", "2.png", "more/3.png")
    (elsewhere / "back").symlink_to(plain / "cat")
    (elsewhere / "own").symlink_to(elsewhere)
    (plain / "cat/one").symlink_to(elsewhere)
    make(plain, "cat/a/x.png", "cat/b/y.png")
    (plain / "cat/a/to_b").symlink_to("../b")
    (plain / "cat/b/to_a").symlink_to("../a")
    found = names_of(FolderSource(plain), plain)
    assert found == ["cat/0.png", "cat/1.png", "cat/a/x.png", "cat/b/y.png", "cat/one/2.png", "cat/one/more/3.png", *RIGHT[2:]]


def test_a_web_of_links_ends(plain: Path, tmp_path: Path) -> None:
    web = [tmp_path / f"web{number}" for number in range(12)]
    for one in web:
        make(one, "0.png")
        for other in web:
            (one / other.name).symlink_to(other)
    (plain / "cat/web").symlink_to(web[0])
    with pytest.raises(UserError, match="links lead there over 100 times; remove some"):
        FolderSource(plain)


def test_what_is_left_out_is_counted(plain: Path, said: list[str]) -> None:
    make(
        plain,
        "cat/a.heic",
        "cat/b.HEIC",
        "cat/notes.txt",
        "dog/README",
        "list.csv",
        "dog/c.mp4",
        "dog/d.ico",
        "dog/e.svg",
        "dog/f.psd",
    )
    os.mkfifo(plain / "dog/fifo.png")
    (plain / "dog/gone.png").symlink_to("nowhere.png")
    make(plain, "dog/LOUD.PNG", "dog/2.JPeG")
    source = FolderSource(plain)
    assert names_of(source, plain) == [
        "cat/0.png",
        "cat/1.png",
        "dog/0.png",
        "dog/1.jpg",
        "dog/2.JPeG",
        "dog/LOUD.PNG",
        "dog/gone.png",
    ]
    assert source.left_out == "2 .heic, 1 .ico, 1 .mp4, 1 .psd, 1 .svg, 1 .txt, 3 of other kinds"
    assert said == [f"{plain}: left out are {source.left_out}"]
    with pytest.raises(FileNotFoundError):
        source[6]
    make(plain, "bird/a.heic", "bird/b.heic")
    with pytest.raises(UserError, match=r"bird: the class has no image of AVIF.*JPEG.*, only 2 \.heic; add some or remove"):
        FolderSource(plain)


@pytest.mark.parametrize("closed", ["cat", "dog/more/deep", ""])
def test_a_folder_that_cannot_be_read_is_named(closed: str, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(plain, "dog/more/deep/0.png")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if os.path.normpath(path) == os.path.normpath(plain / closed):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        UserError, match=rf"{plain / closed}: the folder cannot be read \(Permission denied\); change its permissions"
    ):
        FolderSource(plain)


def test_another_level_is_noticed(tmp_path: Path, said: list[str]) -> None:
    twice = make(tmp_path / "twice", "train/train/cat/0.png", "train/train/dog/0.png", "val/cat/0.png")
    with pytest.raises(UserError, match=r"holds one folder, train, and the classes seem to lie in it \(cat, dog\); move them up"):
        open_source("image_folder", twice, "train")
    with pytest.raises(UserError, match="no val or validation folder beside train"):
        open_folder_to_evaluate(make(tmp_path / "untold", "train/cat/0.png", "test/cat/0.png"))
    deep = make(tmp_path / "deep", "cat/cat/0.png", "dog/spaniel/0.png", "dog/0.png")
    source, theirs = FolderSource(deep), ImageFolder(deep)
    assert list(source.class_names) == theirs.classes
    assert list(zip(source.paths, source.labels.tolist(), strict=True)) == theirs.imgs
    assert said == [
        f"{deep}: pictures in subfolders, as in cat/cat, are of class cat, as torchvision has it; timm would name a class after cat"
    ]


def test_numbers_are_in_the_order_of_their_values_as_in_timm(tmp_path: Path) -> None:
    data = make(tmp_path, *(f"{split}/{n}/0.png" for split in ("train", "val") for n in range(12)))
    ours, theirs = open_source("image_folder", data, "train"), create_dataset("", root=str(data / "train")).reader.class_to_idx
    assert ours.class_names == tuple(sorted(theirs, key=theirs.get)) == tuple(map(str, range(12)))
    assert [int(Path(ours.where(n)).parent.name) for n in range(12)] == ours.labels.tolist()
    assert open_source("image_folder", data, "val").class_names == ours.class_names
    assert match_labels(None, 12, ours.class_names).tolist() == list(range(12))
    assert folders.ordered(["10", "9", "010", "1"]) == ["1", "9", "010", "10"]
    for texts in (["c10", "c9"], ["10", "9", "x"], ["1.5", "10", "9"], ["-1", "10", "9"], ["٣", "10", "9"]):
        assert folders.ordered(texts) == sorted(texts)


def test_a_file_states_another_order(tmp_path: Path) -> None:
    """How a run goes on whose folders were in the order of text, and how a teacher of torchvision's order is followed."""
    data = make(tmp_path, *(f"{split}/{n}/0.png" for split in ("train", "val") for n in (0, 1, 2, 10)))
    lexicographic = ImageFolder(data / "train")
    for text in ('["0", "1", "10", "2"]', '{"2": 3, "0": 0, "10": 2, "1": 1}'):
        (data / folders.CLASS_ORDER).write_text(text)
        source = open_source("image_folder", data, "train")
        assert list(source.class_names) == lexicographic.classes
        assert {(Path(source.where(n)).parent.name, int(source.labels[n])) for n in range(4)} == set(
            lexicographic.class_to_idx.items()
        )
        assert open_source("image_folder", data, "val").class_names == source.class_names
        assert open_folder_to_evaluate(data).class_names == source.class_names
    for text, message in (
        ('["0", "1", "2"]', "class '10' is not among"),
        ('["0", "1", "2", "10", "2"]', "'2' is there twice"),
        ('{"0": 0, "1": 1, "2": 2, "10": 9}', "indices are not 0 to 3"),
        ('{"0": 0, "1": 1.5}', "1: must be an integer, got 1.5"),
        ("[" * 100_000, "cannot be read"),
        ("\x00", "cannot be read"),
        ("[]", "there is none"),
    ):
        (data / folders.CLASS_ORDER).write_text(text)
        with pytest.raises(UserError, match=message):
            open_source("image_folder", data, "train")


@pytest.mark.parametrize(
    ("names", "other"),
    [
        (tuple(map(str, range(11))), "its logit 2 is taken for 2; a network that was trained with other code may mean 10"),
        (
            tuple(sorted(f"c{n}" for n in range(11))),
            "its logit 2 is taken for c10; a network that was trained with other code may mean c2",
        ),
        (("B", *"acdefghijk"), "its logit 0 is taken for B; a network that was trained with other code may mean a"),
        (tuple("abcdefghijk"), None),
        (tuple("kjihgfedcba"), None),
    ],
)
def test_an_order_that_a_nameless_teacher_may_not_share_is_said(
    names: tuple[str, ...], other: str | None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_teacher", lambda *_, **__: load_teacher("resnet10t", 11, weights="random"))
    its_images = ["data.img_size=224", "data.mean=[0.485, 0.456, 0.406]"]
    build.build_teachers(recipes.load("quickstart", ["teacher.name=somebody", "distill.kd_weight=1", *its_images]), names)
    assert [line for line in said if other and other in line] == said
    assert len(said) == (other is not None)


def test_names_of_classes_between_train_and_val(tmp_path: Path, said: list[str]) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data = make(tmp_path / "a", f"train/{composed}/0.png", "train/dog/0.png", f"val/{decomposed}/0.png", "val/dog/0.png")
    val = open_source("image_folder", data, "val")
    assert val.class_names == (composed, "dog")
    assert val.labels.tolist() == [0, 1]
    assert said == []
    with pytest.raises(UserError, match="are two classes that differ in how accents are encoded alone; make one of them"):
        FolderSource(make(tmp_path / "b", f"{composed}/0.png", f"{decomposed}/0.png"))
    FolderSource(make(tmp_path / "c", "Cat/0.png", "cat/0.png"))
    assert said == [f"{tmp_path}/c: 'Cat' and 'cat' are two classes that differ in capital letters alone"]
    with pytest.raises(UserError, match=r"class 'cat' is not among the training classes \(did you mean Cat\?\)"):
        open_source("image_folder", make(tmp_path / "d", "train/Cat/0.png", "val/cat/0.png"), "val")
    subset = open_source("image_folder", make(tmp_path / "e", "train/a/0.png", "train/b/0.png", "val/b/0.png"), "val")
    assert (subset.class_names, subset.labels.tolist()) == (("a", "b"), [1])


def test_names_that_are_not_utf8_or_hold_newlines(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "train")
    for name in (b"caf\xe9", b"new\nline", b"esc\x1b[31m"):
        os.makedirs(os.path.join(root, name))
        with open(os.path.join(root, name, b"\xff.png"), "wb") as file:
            file.write(PNG)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    source = open_source("image_folder", tmp_path, "train")
    assert source.class_names == ("caf\\xe9", "esc\x1b[31m", "new\nline")
    assert open_source("image_folder", tmp_path, "val").class_names == source.class_names
    for index in range(3):
        assert source[index][1] == index
        assert "\n" not in source.where(index)
        source.where(index).encode()
    os.makedirs(os.path.join(root, b"bad\n\xff"))
    with pytest.raises(UserError) as raised:
        open_source("image_folder", tmp_path, "train")
    assert "bad\\n\\udcff: the class has no image" in str(raised.value)


def test_what_does_not_change(fashion_folder: Path) -> None:
    """The order of right data is torchvision's."""
    ours, theirs = open_source("image_folder", fashion_folder, "train"), ImageFolder(fashion_folder / "train")
    assert [(ours.where(n), int(ours.labels[n])) for n in range(len(ours))] == theirs.imgs
    assert ours.left_out == ""


def idx(shape: tuple[int, ...], content: bytes, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + content


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx((2, 3, 4), bytes(24)), idx((3,), bytes(3)), "holds 2 images, labels.gz 3 labels"),
        (idx((2, 3, 4), bytes(24)), idx((2,), b"\x00\x0a"), "label 10 is none of the 10 classes, 0 to 9"),
        (idx((2, 12), bytes(24)), idx((2,), bytes(2)), "no IDX file of bytes with 3 dimensions"),
        (idx((2, 3, 4), bytes(24)), idx((2, 1), bytes(2)), "no IDX file of bytes with 1 dimensions"),
        (idx((-2, 3, -4), bytes(24)), idx((2,), bytes(2)), "declares the sizes -2, 3, -4"),
        (idx((2, 3, 4), bytes(23)), idx((2,), bytes(2)), "declares 24 bytes, it holds 23"),
        (idx((2, 3, 4), bytes(24) + b"x"), idx((2,), bytes(2)), "declares 24 bytes, it holds more"),
        (idx((2**31 - 1, 4096, 4096), b""), idx((2,), bytes(2)), "declares the sizes"),
        (idx((2, 3, 4), bytes(24), 13), idx((2,), bytes(2)), "no IDX file of bytes"),
        (idx((0, 3, 4), b""), idx((0,), b""), "declares the sizes 0, 3, 4"),
        (b"", idx((2,), bytes(2)), "no IDX file of bytes"),
    ],
)
def test_idx_is_held_against_its_header(images: bytes, labels: bytes, message: str, tmp_path: Path) -> None:
    for name, content in (("images.gz", images), ("labels.gz", labels)):
        (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=message):
        read_idx(tmp_path / "images.gz", tmp_path / "labels.gz", 10)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 24 bytes, and zeros without end behind it: no more is read than the header says."""
    taken = Counter[str]()
    real = gzip.GzipFile.read

    def read(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        assert size is not None
        assert size >= 0, "reads all"
        taken["bytes"] += len(found := real(self, size))
        return found

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx((2, 3, 4), bytes(50_000_000))))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx((2,), bytes(2))))
    with pytest.raises(UserError, match="holds more"):
        read_idx(tmp_path / "images.gz", tmp_path / "labels.gz", 10)
    assert taken["bytes"] < 100


def test_photos_are_not_taken_for_fashion_mnist(plain: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "photos", "train/cat/0.png", "val/cat/0.png")
    with pytest.raises(UserError, match="holds a train folder, and no Fashion-MNIST; .* data.source=image_folder"):
        open_source("fashion_mnist", data, "train")
    assert sorted(path.name for path in data.iterdir()) == ["train", "val"]


def test_a_failed_download_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def fail(root: str, **_: Any) -> None:
        (Path(root) / "FashionMNIST/raw").mkdir(parents=True)
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(UserError, match="downloading it failed"):
        open_source("fashion_mnist", tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["00000000", "00050001", "99999999"])
def test_real_has_labels_of_its_images_alone(number: str, tmp_path: Path) -> None:
    make(tmp_path, f"n01440764/ILSVRC2012_val_{number}.JPEG", "n01440764/ILSVRC2012_val_00000293.JPEG")
    with pytest.raises(UserError, match=rf"val_{number}.JPEG: ReaL has labels of the images 1 to 50,000 alone; remove it"):
        open_benchmark("imagenet-real", tmp_path)


def test_imagenet_v2_keeps_the_order_of_its_numbers(tmp_path: Path) -> None:
    source = open_benchmark("imagenet-v2", make(tmp_path, "0/0.png", "10/0.png", "2/0.png"))[""].source
    assert np.unique(source.labels).tolist() == [0, 2, 10]
    assert {Path(source.where(n)).parent.name: int(source.labels[n]) for n in range(3)} == {"0": 0, "2": 2, "10": 10}


def test_classes_without_pictures_and_folders_beside_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("train/a", "train/b", "val/a", "validation/a", "test/a"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "x.png")
    (tmp_path / "class_order.json").write_text('["a", "b", "c"]')
    recipe = recipes.load("quickstart_alone", ["data.source=image_folder", "data.num_classes=auto", "data.train_images=auto"])
    train, val = open_data(recipe.data, tmp_path)
    said = capsys.readouterr().err
    assert f"{tmp_path}/train: no training image of 1 of the 3 classes (c)" in said
    assert f"{tmp_path}/val: no validation image of 1 of the 3 classes (b)" in said
    assert (train.left_out, val.left_out) == ("", "the folder validation, the folder test")
