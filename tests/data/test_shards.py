"""Shards: the same images, labels and stream as the folder that they were packed from."""

from __future__ import annotations

import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import killing
from conftest import SMALL
from deit_kd.cli import main
from deit_kd.data import open_source
from deit_kd.data.sources.pack import pack
from deit_kd.errors import UserError
from programs import run_script
from streams import stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    """Several of them: 50 kB each."""
    output = tmp_path_factory.mktemp("packed") / "shards"
    pack(fashion_folder, output, None, 50_000)
    return output


def test_the_stream_is_the_folders(shards: Path, fashion_folder: Path, tmp_path: Path) -> None:
    assert len(list(shards.glob("train-*.tar"))) > 2
    for split in ("train", "val"):
        ours, theirs = open_source("shards", shards, split), open_source("image_folder", fashion_folder, split)  # type: ignore[arg-type]
        assert (ours.class_names, len(ours)) == (theirs.class_names, len(theirs))
        assert np.array_equal(ours.labels, theirs.labels)
        assert all(ours[index][0].tobytes() == theirs[index][0].tobytes() for index in range(0, len(ours), 7))
    folder = stream(fashion_folder, 1)
    for layout in ({}, {"workers": 2}, {"workers": 1, "processes": 2, "accumulation": 2}):
        assert stream(shards, 1, source="shards", **layout) == folder, layout
    assert stream(shards, 1, start=7, source="shards") < folder
    unindexed = tmp_path / "unindexed"
    shutil.copytree(shards, unindexed, ignore=shutil.ignore_patterns("index_*"))
    assert stream(unindexed, 1, source="shards") == folder


def test_it_is_webdatasets_layout_and_the_same_bytes_twice(shards: Path, fashion_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(sorted(shards.glob("val-*.tar"))[0]) as tar:
        names = tar.getnames()
    assert names[:4] == ["00000000.png", "00000000.cls", "00000001.png", "00000001.cls"]
    pack(fashion_folder, tmp_path / "again", None, 50_000)
    for file in shards.glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.slow
def test_a_run_on_shards(shards: Path, tmp_path: Path) -> None:
    options = [*SMALL, "data.source=shards", "teacher.name=resnet10t", "teacher.weights=random"]
    done = run_script(
        "train.py", "--recipe", "quickstart", "--data", shards, "--output", tmp_path / "run", "--max-steps", 2, *options
    )
    assert done.returncode == 0, done.stderr
    assert "images of 10 classes in" in (tmp_path / "run/student/README.md").read_text()


def test_larger_images_are_shrunk(photo_folder: Path, tmp_path: Path) -> None:
    pack(photo_folder, tmp_path / "small", 64, 10_000_000)
    source = open_source("shards", tmp_path / "small", "val")
    assert {min(source[index][0].size) for index in range(len(source))} == {64}
    broken = tmp_path / "broken"
    shutil.copytree(photo_folder, broken)
    image = next((broken / "train").rglob("*.*"))
    image.write_bytes(image.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        pack(broken, tmp_path / "none", 64, 10_000_000)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / ".none.tmp").exists()


def test_faults_are_named(shards: Path, fashion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pack", "--data", str(fashion_folder), "--output", str(shards)])
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no train-\*\.tar; make shards"):
        open_source("shards", tmp_path, "train")
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    last = sorted(damaged.glob("train-*.tar"))[-1]
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{last.name}: is cut off"):
        open_source("shards", damaged, "train")
    shutil.rmtree(damaged)
    shutil.copytree(shards, damaged)
    index = (damaged / "index_train.npz").read_bytes()
    for content in (b"", b"none", index[:-200], index[:300] + bytes([index[300] ^ 1]) + index[301:]):
        (damaged / "index_train.npz").write_bytes(content)
        with pytest.raises(UserError, match="index_train.npz: is damaged"):
            open_source("shards", damaged, "train")
    (damaged / "classes.json").write_text("10")
    with pytest.raises(UserError, match=r"classes.json: must be a list, got 10; it holds"):
        open_source("shards", damaged, "train")
    shutil.rmtree(damaged)
    damaged.mkdir()
    (damaged / "classes.json").write_text('["a"]')
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    with tarfile.open(damaged / "train-0.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
    with pytest.raises(UserError, match=r"train-0.tar: 0: has no \.cls beside it"):
        open_source("shards", damaged, "train")


def test_interrupted_packing_leaves_nothing(fashion_folder: Path, tmp_path: Path) -> None:
    added, add = [0], tarfile.TarFile.addfile

    def interrupted(*arguments: Any, **kwargs: Any) -> None:
        added[0] += 1
        if added[0] == 100:
            assert list(tmp_path.rglob("*.tar")), "some of it is written"
            signal.raise_signal(signal.SIGINT)
        add(*arguments, **kwargs)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
        tarfile.TarFile.addfile = interrupted  # type: ignore[method-assign]
        main(["pack", "--data", str(fashion_folder), "--output", str(tmp_path / "out"), "--short-side", "14"])

    ended = killing.run(work, tmp_path)
    assert ended.code == 130, ended.printed
    assert "Traceback" not in ended.printed
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()
