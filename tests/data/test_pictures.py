"""Pictures as strangers make them: formats that are opened at all, orientation, odd modes and shapes."""

from __future__ import annotations

import ast
import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from conftest import ROOT
from deit_kd import recipe as recipes
from deit_kd.cli import main
from deit_kd.data import EvaluationLoader, LoaderConfig, decode, open_source
from deit_kd.data.build import open_data
from deit_kd.data.sources.base import pixels, pixels_or_jpeg, split_holdout, turned
from deit_kd.data.sources.pack import pack
from deit_kd.data.transforms import evaluation_transform
from deit_kd.errors import UserError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nnewpath 0 0 moveto 10 10 lineto stroke\nshowpage\n%%EOF\n"
NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF"}


def photo() -> Image.Image:
    """Wider than high, and no two corners alike."""
    image = Image.new("RGB", (48, 32), (30, 30, 30))
    draw = ImageDraw.Draw(image)
    for box, color in (((0, 0, 15, 15), "red"), ((32, 0, 47, 15), "lime"), ((0, 16, 15, 31), "blue"), ((32, 16, 47, 31), "white")):
        draw.rectangle(box, color)
    return image


def encoded(image: Image.Image, kind: str = "PNG", way: int | None = None, **settings: Any) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    if way is not None:
        exif[decode.ORIENTATION] = way
        settings["exif"] = exif
    if kind == "JPEG":
        settings |= {"quality": 95, "subsampling": 0}
    if kind == "WEBP":
        settings["lossless"] = True
    image.save(stream, kind, **settings)
    return stream.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    """The same for train and val, names CLASS/FILE."""
    for split in ("train", "val"):
        for name, content in files.items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What of programs is started, by whatever way."""
    started: list[Any] = []

    class Refused(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **_: Any):
            started.append(arguments)
            raise OSError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", Refused)
    monkeypatch.setattr(os, "system", started.append)
    return started


def test_only_one_place_opens_pictures() -> None:
    """And it names the formats: `Image.open` alone would take any."""
    for file in (ROOT / "deit_kd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                assert file.name == "decode.py", file
                assert any(keyword.arg == "formats" for keyword in node.keywords)
    assert not {"EPS", "PS", "PDF", "WMF", "FPX", "MIC", "GRIB", "HDF5", "BUFR", "PSD", "ICNS", "FITS"} & set(decode.FORMATS)


@pytest.mark.parametrize("name", ["x.png", "x.eps", "x.jpg"])
def test_postscript_starts_no_program_anywhere(
    name: str, tmp_path: Path, no_programs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow alone starts ghostscript for it, whatever its name is."""
    with Image.open(io.BytesIO(EPS)) as image, pytest.raises(OSError, match=r"[Gg]hostscript|a program was started"):
        image.load()
    no_programs.clear()
    root = folder(tmp_path / "data", {"a/0.png": encoded(photo()), f"a/{name}": EPS, "b/0.png": encoded(photo())})
    source = open_source("image_folder", root, "train")
    assert len(source) == (2 if name == "x.eps" else 3)
    for index in range(len(source)):
        for read in (pixels, pixels_or_jpeg, lambda source, index: source[index]):
            if name in source.where(index):
                with pytest.raises(Exception, match="is no picture of a format that is read here: .*JPEG"):
                    read(source, index)
            else:
                read(source, index)
    if name != "x.eps":
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            pack(root, tmp_path / "shards", 8, 1_000_000)
    with pytest.raises(SystemExit):
        main(["predict", "quickstart_teacher", str(root / "train/a" / name), str(root / "train/a/0.png")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "is no picture" in lines[0]["error"]
    assert lines[1]["predictions"]
    assert not no_programs


@pytest.mark.parametrize("suffix", list(NAMES))
@pytest.mark.parametrize("way", range(1, 9))
def test_orientation(suffix: str, way: int) -> None:
    """Against Pillow's own. TIFF is always turned: Pillow does it when it reads."""
    content = encoded(photo(), NAMES[suffix], way)
    with Image.open(io.BytesIO(content)) as image:
        stored = np.asarray(image.convert("RGB"))
    with Image.open(io.BytesIO(content)) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    for read in (decode.decode_image, lambda *arguments: decode.decode(*arguments).permute(1, 2, 0)):
        np.testing.assert_array_equal(np.asarray(read(content)), stored)
        np.testing.assert_array_equal(np.asarray(read(content, True)), shown)
    assert (shown.shape == (48, 32, 3)) == (way > 4)
    assert (decode.as_jpeg(content, True) is None) == (suffix != "jpg" or way != 1)
    assert (decode.as_jpeg(content) is None) == (suffix != "jpg")


def test_damaged_orientation_is_none() -> None:
    content = encoded(photo(), "JPEG", 6)
    place = content.index(b"Exif\0\0") + 6
    for broken in (b"XX\0\0", b"MM\0*\xff\xff\xff\xff", b"II*\0"):
        changed = content[:place] + broken + content[place + len(broken) :]
        assert decode.decode_image(changed, True).size == (48, 32)
    assert decode.decode_image(encoded(photo(), "JPEG", 9), True).size == (48, 32)


def test_one_key_turns_pictures_in_training_evaluation_and_packing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stored lying, with a note how to turn them, as phones do it: with the key they are what stands."""
    lying = encoded(photo().transpose(Image.Transpose.ROTATE_90), "JPEG", 6)
    root = folder(tmp_path / "data", {"a/0.jpg": lying, "a/1.jpg": lying, "b/0.jpg": lying, "b/1.jpg": lying})
    words = ["data.source=image_folder", "data.num_classes=auto", "data.train_images=auto"]
    recipe, old = recipes.load("quickstart", [*words, "data.exif_orientation=apply"]), recipes.load("quickstart", words)
    train, val = open_data(recipe.data, root)
    assert capsys.readouterr().err == ""
    assert [source[0][0].size for source in (train, val)] == [(48, 32), (48, 32)]
    assert pixels(train, 0).shape == (3, 32, 48)
    assert isinstance(pixels_or_jpeg(train, 0), torch.Tensor)
    assert all(part[0][0].size == (48, 32) for part in split_holdout(train, 0.5, 0))
    train, val = open_data(old.data, root)
    assert [source[0][0].size for source in (train, val)] == [(32, 48), (32, 48)]
    assert "4 of 4 images carry an EXIF orientation" in capsys.readouterr().err
    assert turned(train) == 4
    for short_side in (None, 16):
        pack(root, tmp_path / f"shards {short_side}", short_side, 1_000_000)
        shards = [open_source("shards", tmp_path / f"shards {short_side}", "val", upright=upright) for upright in (True, False)]
        assert [source[0][0].size[0] > source[0][0].size[1] for source in shards] == [True, False]
    assert recipes.fingerprint(old) == recipes.fingerprint(recipes.load("quickstart", [*words, "data.exif_orientation=null"]))
    assert recipes.differences(old, recipe) == ["data.exif_orientation: None -> apply"]
    place = LoaderConfig(torch.device("cpu"), 1, 0, 0, "refuse", print)
    (images, _), *_ = EvaluationLoader(
        open_data(recipe.data, root)[1], evaluation_transform(recipe.data, recipe.evaluation), place, 4
    )
    expected = evaluation_transform(recipe.data, recipe.evaluation)(decode.decode_image(lying, True))
    torch.testing.assert_close(images[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["finetune:full", "finetune:probe", "finetune:taught"])
def test_recipes_for_own_photos_turn_them(recipe: str) -> None:
    assert recipes.load(recipe).data.exif_orientation == "apply"


def test_predict_and_evaluate_turn_pictures_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source("fashion_mnist", None, "val")
    for index in range(40):
        image, label = source[index]
        path = tmp_path / "photos/val" / source.class_names[label].replace("/", "") / f"{index}.jpg"
        if label != 0:  # whose name is no name of a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image.resize((112, 112)).transpose(Image.Transpose.ROTATE_90), "JPEG", 6))

    def predicted(*options: str) -> float:
        with pytest.raises(SystemExit):
            main(["predict", "quickstart_teacher", str(tmp_path / "photos"), "--top", "1", *options])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return 100 * float(np.mean([line["predictions"][0]["label"] == Path(line["image"]).parent.name for line in lines]))

    def evaluated(*options: str) -> float:
        folder = tmp_path / f"report{len(options)}"
        main(["evaluate", "quickstart_teacher", "--data", str(tmp_path / "photos"), "--output", str(folder), *options])
        return float(json.loads((folder / "report.json").read_text())["top1"])

    for measured in (predicted, evaluated):
        assert measured() > 80
        assert measured("--exif-orientation", "ignore") < 40


def gray_tiff(bits: int, values: list[int]) -> bytes:
    """An uncompressed TIFF of one row, of samples packed tightly, the first bit first."""
    packed = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    tags = [
        (256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 1),
        (279, 4, len(packed)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    body = packed + b"\0" * (len(packed) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)


def test_samples_of_more_than_8_bits(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits are scaled by their range; TIFF says that it has 12; a PNG of 12 bits in 16 does not, which is said."""
    said: list[str] = []
    monkeypatch.setattr(decode, "warn", said.append)
    sixteen = Image.fromarray(np.array([[0, 255, 256, 4096, 65535]], np.uint16))
    assert np.asarray(decode.decode_image(encoded(sixteen)))[0, :, 0].tolist() == [0, 0, 1, 16, 255]
    twelve = decode.decode_image(gray_tiff(12, [0, 15, 16, 2048, 4095, 4080]))
    assert np.asarray(twelve)[0, :, 1].tolist() == [0, 0, 1, 128, 255, 255]
    assert not said
    assert np.asarray(decode.decode_image(encoded(Image.fromarray(np.array([[0, 4095]], np.uint16))))).max() == 15
    assert "12 bits, perhaps" in said.pop()
    # the same in color, where Pillow gives 8 bits and does not say that there were 16
    rows = b"\0" + struct.pack(">6H", 0, 1000, 4095, 0, 2000, 4000)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    color = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    assert np.asarray(decode.decode_image(color)).max() == 15
    assert "12 bits, perhaps" in said.pop()
    decode.decode_image(encoded(Image.new("RGB", (4, 4), (3, 3, 3))))
    decode.decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))
    assert not said


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("PA", lambda: encoded(photo().convert("P"), transparency=bytes(range(200)))),
        ("LA", lambda: encoded(photo().convert("LA"))),
        ("1", lambda: encoded(photo().convert("1"))),
        ("CMYK", lambda: encoded(photo().convert("CMYK"), "JPEG")),
        ("YCbCr", lambda: encoded(photo().convert("YCbCr"), "JPEG")),
        ("RGBA", lambda: encoded(photo().convert("RGBA"), "WEBP")),
    ],
)
def test_odd_modes_are_as_torchvisions_loader_has_them(name: str, make: Callable[[], bytes]) -> None:
    content = make()
    with Image.open(io.BytesIO(content)) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode.decode_image(content)), expected)
    np.testing.assert_array_equal(decode.decode(content, True).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    content = encoded(photo(), kind, save_all=True, append_images=[Image.new("RGB", (48, 32), "yellow")])
    pixels = np.asarray(decode.decode_image(content))
    assert pixels[4, 4].tolist() == [255, 0, 0] or (kind == "GIF" and pixels[4, 4][0] > 200 > pixels[4, 4][1])


def png_header(width: int, height: int) -> bytes:
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_header(40_000, 40_000), "exceeds limit"),
        (encoded(Image.new("L", (1, 60_000))), "is 1 x 60,000 pixels: a side over 200 times the other"),
        (encoded(Image.new("L", (60_000, 1))), "is 60,000 x 1 pixels"),
        (encoded(photo(), "JPEG")[:-300], "(?i)truncated"),
        (b"GIF89a" + bytes(20), "."),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8), "."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
    ],
)
def test_shapes_and_cuts_that_are_refused(content: bytes, reason: str) -> None:
    for read in (decode.decode_image, decode.decode, decode.as_jpeg):
        with pytest.raises(Exception, match=reason):
            read(content)


def test_what_is_no_regular_file_or_too_large_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(decode.MOST_BYTES + 1)
    for name, reason in (("fifo.png", "is no regular file"), ("large.png", "is 600 MB large"), ("gone.png", "No such file")):
        with pytest.raises((OSError, ValueError), match=reason):
            decode.read_picture(tmp_path / name)
    with pytest.raises((OSError, ValueError), match="is no regular file"):
        decode.read_picture("/dev/zero")
    names = [str(tmp_path / name) for name in ("fifo.png", "large.png")] + ["/dev/zero"]
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "quickstart_teacher", *names])
    assert stopped.value.code == 1
    lines = [json.loads(line)["error"] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["is no regular file", "is 600 MB large, a picture has at most 600 MB", "is no regular file"]


def test_predict_survives_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout is strict, as it is in most locales."""
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9\n.png"), "wb") as file:
        file.write(encoded(photo()))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", errors="strict"))
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "quickstart_teacher", str(tmp_path)])
    assert stopped.value.code == 0
    assert json.loads(written.getvalue())["image"] == f"{tmp_path}/caf\\xe9\n.png"


@pytest.mark.parametrize("most", [65535, 4095])
def test_grey_pgm_of_more_than_8_bits(most: int) -> None:
    """Black, half and white are that, whatever number a file takes for white; Pillow reads them as 32-bit integers up to 65,535."""
    values = np.tile(np.array([0, most // 2, most], dtype=">u2"), (4, 1))
    pixels = decode.decode(f"P5\n3 4\n{most}\n".encode() + values.tobytes())
    assert pixels.shape == (3, 4, 3)
    assert pixels[:, 0].tolist() == [[0, 127, 255]] * 3
