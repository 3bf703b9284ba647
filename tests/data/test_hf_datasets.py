"""Tables that `datasets` reads: the folder's labels and stream; Parquet, tars, a server; what is wrong with a table is told."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from conftest import ROOT, SMALL
from deit_kd.data import open_source
from deit_kd.data.sources.hf_datasets import _synsets
from deit_kd.data.sources.pack import pack
from deit_kd.errors import UserError
from streams import stream


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(folder: Path, split: str, label: datasets.Value | datasets.ClassLabel | None = None) -> datasets.Dataset:
    source = open_source("image_folder", folder, split)  # type: ignore[arg-type]
    rows = {"picture": source.paths, "label": source.labels}  # type: ignore[attr-defined]
    kinds = {"picture": datasets.Image(), "label": label or datasets.ClassLabel(names=list(source.class_names))}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    """As the hub lays them out."""
    root = tmp_path_factory.mktemp("parquet")
    for split, name in (("train", "train"), ("val", "validation")):
        whole = table(fashion_folder, split)
        for number in range(2):
            whole.shard(2, number, contiguous=True).to_parquet(root / f"{name}-{number:05d}-of-00002.parquet")
    return root


def test_the_stream_is_the_folders(parquet: Path, fashion_folder: Path) -> None:
    for split in ("train", "val"):
        ours, theirs = open_source("hf_datasets", parquet, split), open_source("image_folder", fashion_folder, split)  # type: ignore[arg-type]
        assert (ours.class_names, len(ours)) == (theirs.class_names, len(theirs))
        assert np.array_equal(ours.labels, theirs.labels)
    folder = stream(fashion_folder, 1)
    for layout in ({}, {"workers": 2}, {"workers": 1, "processes": 2, "accumulation": 2}):
        assert stream(parquet, 1, source="hf_datasets", **layout) == folder, layout
    assert stream(parquet, 1, start=7, source="hf_datasets") < folder


def test_columns_without_names_and_imagenets_names(fashion_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        table(fashion_folder, split, datasets.Value("int64")).to_parquet(tmp_path / f"{split}.parquet")
    source = open_source("hf_datasets", tmp_path / "{split}.parquet", "val")
    assert source.class_names == tuple("0123456789")
    assert "row 3 of" in source.where(3)
    info = ImageNetInfo("imagenet-1k")
    assert _synsets(tuple(info.label_descriptions())) == tuple(info.label_names())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Of the files in tmp_path."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{here.server_port}"
        here.shutdown()


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.slow
def test_a_run_on_files_behind_urls(kind: str, server: str, parquet: Path, fashion_folder: Path, tmp_path: Path) -> None:
    if kind == "tar":
        pack(fashion_folder, tmp_path / "shards", None, 10_000_000)
    for split, name in (("train", "train"), ("val", "validation")):
        made = tmp_path / f"shards/{split}-000000.tar" if kind == "tar" else parquet / f"{name}-00000-of-00002.parquet"
        (tmp_path / f"{split}.{kind}").symlink_to(made)
    options = [*SMALL, "data.source=hf_datasets", "teacher.name=resnet10t", "teacher.weights=random", "global_batch_size=12"]
    command = [
        "train.py",
        "--recipe",
        "quickstart",
        "--data",
        f"{server}/{{split}}.{kind}",
        "--output",
        tmp_path / "run",
        "--max-steps",
        2,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_CACHE": str(tmp_path / "another cache")}
    done = subprocess.run(
        [sys.executable, *map(str, command), *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "validation" in done.stdout
    assert (tmp_path / "run/student/model.safetensors").exists()


def test_faults_are_named(fashion_folder: Path, tmp_path: Path) -> None:
    def refuse(message: str, data: Path | None = tmp_path / "{split}.parquet") -> None:
        with pytest.raises(UserError, match=message):
            open_source("hf_datasets", data, "train")

    refuse("needs --data", None)
    refuse("datasets cannot read it", tmp_path / "nowhere")
    refuse("datasets cannot read it")
    whole = table(fashion_folder, "train", datasets.Value("int64"))
    whole.to_parquet(tmp_path / "train.parquet")
    refuse("datasets cannot read it")
    whole.remove_columns("label").to_parquet(tmp_path / "train.parquet")
    whole.remove_columns("label").to_parquet(tmp_path / "val.parquet")
    refuse("needed is one column of images and one of labels")
    for split in ("train", "val"):
        whole.map(lambda row: {"label": row["label"] - 1}).to_parquet(tmp_path / f"{split}.parquet")
    refuse("rows without a label")
    for values, message in (
        ([str(label) for label in whole["label"]], "labels are (large_)?string"),
        ([float(label) for label in whole["label"]], "labels are double"),
        ([None, *whole["label"][1:]], "rows without a label"),
        ([label + 1 for label in whole["label"]], "begin with 1"),
    ):
        for split in ("train", "val"):
            whole.remove_columns("label").add_column("label", values).to_parquet(tmp_path / f"{split}.parquet")
        refuse(message)
    names = open_source("image_folder", fashion_folder, "train").class_names
    table(fashion_folder, "train").to_parquet(tmp_path / "train.parquet")
    table(fashion_folder, "val", datasets.ClassLabel(names=list(names[::-1]))).to_parquet(tmp_path / "val.parquet")
    refuse("classes in another order")
    refuse("classes in another order", tmp_path)
    (tmp_path / "folder").mkdir()
    whole.to_parquet(tmp_path / "folder/train.parquet")
    refuse("has the splits train; needed", tmp_path / "folder")


def small(labels: list[int], **more: datasets.Value | datasets.ClassLabel) -> datasets.Dataset:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    columns = {"image": [{"bytes": stream.getvalue(), "path": None}] * len(labels), **dict.fromkeys(more, labels)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), **more}))


def test_numbers_beside_declared_classes_are_asked_for(tmp_path: Path) -> None:
    kinds = {"label": datasets.Value("int64"), "superclass": datasets.ClassLabel(names=["a", "b"])}
    for split in ("train", "val"):
        small([0, 1, 0, 1], **kinds).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match="has the labels label and superclass; choose with data.label_column=label"):
        open_source("hf_datasets", tmp_path, "train")
    assert open_source("hf_datasets", tmp_path, "train", label_column="superclass").class_names == ("a", "b")
    assert open_source("hf_datasets", tmp_path, "train", label_column="label").class_names == ("0", "1")


def test_a_split_is_made_of_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = datasets.ClassLabel(names=["a", "b"])
    for name, labels in (
        ("train-00000-of-00002", [0]), ("train-00001-of-00002-0123abcd", [1]), ("train_clean", [1, 1]), ("train-part", [1, 1]),
        ("validation_0", [0, 1]), ("validation_old", [0] * 5), ("val2", [1] * 5), ("test", [0] * 7),
    ):  # fmt: skip
        small(labels, label=kind).to_parquet(tmp_path / f"{name}.parquet")
    train, val = (open_source("hf_datasets", tmp_path, split) for split in ("train", "val"))  # type: ignore[arg-type]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [0, 1])
    for name in ("train_clean", "train-part", "validation_old", "val2"):
        assert f"1 {name}.parquet" in train.left_out
    assert "7 images of test" in val.left_out
    assert "left out are 1 train-part.parquet, 1 train_clean.parquet" in capsys.readouterr().err


def test_test_images_in_place_of_validation_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        small([0, 1], label=datasets.ClassLabel(names=["a", "b"])).to_parquet(tmp_path / f"{split}.parquet")
    assert len(open_source("hf_datasets", tmp_path, "val")) == 2
    assert "has no split validation or val or valid; its test images are taken for validation" in capsys.readouterr().err
