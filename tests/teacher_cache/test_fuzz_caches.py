"""Forged caches of a teacher, files of class means, and notes of verbs: each is read, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fuzzing
from deit_kd import sweep as grid
from deit_kd.data.sources import packed
from deit_kd.errors import UserError
from deit_kd.evaluation import report
from deit_kd.files.atomic import sha256
from deit_kd.models import CachedTeacher, cached_teacher, teacher_formats
from deit_kd.teacher_cache import class_means, identity
from deit_kd.training import acceleration
from fuzzing import bounded, changed, damaged, json_bytes, survives

WIDTH, CLASSES, BATCH, STEPS, VIEWS = 6, 5, 4, 3, 2
MANIFEST: dict[str, Any] = {
    "format": 1,
    "teacher": {
        **{"name": "resnet10t", "weights": "random", "sha256": "0" * 64, "license": "mit", "parameters": 9},
        **{"num_classes": CLASSES, "label_names": ["a", "b", "c", "d", "e"]},
    },
    **{"ran": "plain", "img_size": None, "width": WIDTH, "views": VIEWS, "features": "pca:2", "logits": "top:2"},
    **{"global_batch_size": BATCH, "steps_per_epoch": STEPS, "steps_per_shard": 2, "bytes_per_image": 30},
    **{"seconds_per_image": 0.1, "errors": {"logits_kl": 0.1}, "validation": {"view": [28, [0.5]]}},
    **{"stream": {"seed": 0, "classes": ["a"]}, "versions": {"torch": "2.0"}, "accuracy": {"teacher_top1": 50.0}},
}


def rows_of(formats: tuple[str, str], count: int, basis: teacher_formats.Basis | None) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    features, logits = torch.randn(count, WIDTH, generator=rng), torch.randn(count, CLASSES, generator=rng)
    return teacher_formats.encode(features, logits, formats, basis)


def write(folder: Path, features: str = "pca:2", logits: str = "top:2") -> Path:
    """A cache, in the layout that it has had from the start."""
    folder.mkdir()
    manifest, basis = {**MANIFEST, "features": features, "logits": logits}, None
    if features.startswith("pca"):
        basis = teacher_formats.fit_basis(torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)), 2)
        save_file(basis._asdict(), folder / "basis.safetensors", {"format": "pt"})
        manifest["basis_sha256"] = sha256(folder / "basis.safetensors")
    for view, first in cached_teacher.shards(manifest):
        rows = rows_of((features, logits), cached_teacher.shard_steps(manifest, first) * BATCH, basis)
        metadata = cached_teacher.shard_metadata(rows, view, first)
        save_file(rows, cached_teacher.shard_file(folder, view, first), metadata)
    cached_teacher.write_manifest(folder, manifest)
    return folder


def read(folder: Path) -> Tensor:
    teacher = CachedTeacher(folder, features=False, logits=False)
    steps, batch = teacher.manifest["steps_per_shard"], teacher.manifest["global_batch_size"]
    found = [teacher(teacher.read(view, first * batch, 1)) for view, first in islice(cached_teacher.shards(teacher.manifest), 4)]
    assert steps >= 1
    return torch.cat([each.features for each in found])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cache") / "cache")


@pytest.mark.parametrize("features", ["float32", "bf16", "int8", "pca:2", "none"])
@pytest.mark.parametrize("logits", ["float32", "full", "top:2", "none"])
def test_right_ones_are_read(features: str, logits: str, tmp_path: Path) -> None:
    if features == logits:
        return
    folder = write(tmp_path / "cache", features, logits)
    assert read(folder).shape == (4, 0 if features == "none" else WIDTH)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("ran", "accuracy", "validation", "own_sha256"):  # not noted from the start
        del manifest[name]
    cached_teacher.write_manifest(folder, manifest)
    assert CachedTeacher(folder, False, False).facts()["ran"] == ""


@bounded
@given(st.data())
def test_manifests(cache: Path, data: st.DataObject) -> None:
    file, whole = cache / "manifest.json", (cache / "manifest.json").read_bytes()
    right = {**json.loads(whole)}
    del right["own_sha256"]
    try:
        if data.draw(st.booleans()):
            forged = data.draw(changed(right))
            hashed = {**forged, "own_sha256": cached_teacher._own_hash(forged)} if isinstance(forged, dict) else forged
            file.write_bytes(json.dumps(hashed).encode("utf-8", "surrogatepass"))
        else:
            file.write_bytes(data.draw(json_bytes(json.loads(whole))))
        survives(lambda: read(cache))

        def agree() -> None:
            identity.must_agree(cache, cached_teacher.read_manifest(cache)["stream"], right["stream"], "cache it anew")

        survives(agree)
    finally:
        file.write_bytes(whole)


@st.composite
def safetensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with other bytes, or another header before the same numbers."""
    (length,) = struct.unpack("<Q", whole[:8])
    if draw(st.booleans()):
        return draw(damaged(whole))
    header = json.dumps(draw(changed(json.loads(whole[8 : 8 + length])))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


@bounded
@given(st.data())
@pytest.mark.parametrize("name", ["view_000_steps_000000.safetensors", "basis.safetensors"])
def test_shards_and_basis(name: str, cache: Path, data: st.DataObject) -> None:
    file, manifest = cache / name, (cache / "manifest.json").read_bytes()
    whole = file.read_bytes()
    try:
        file.write_bytes(data.draw(safetensors(whole)))
        if name.startswith("basis"):  # forged with its hash
            told = {**json.loads(manifest), "basis_sha256": sha256(file)}
            del told["own_sha256"]
            cached_teacher.write_manifest(cache, told)
        survives(lambda: read(cache))
    finally:
        file.write_bytes(whole)
        (cache / "manifest.json").write_bytes(manifest)


def forged(cache: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A cache whose first rows are changed, with the right hash of the changed ones."""
    shutil.copytree(cache, folder)
    file = cached_teacher.shard_file(folder, 0, 0)
    rows = load_file(file)
    change(rows)
    save_file(rows, file, cached_teacher.shard_metadata(rows, 0, 0))
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows["features"].fill_(float("nan")), "features is not finite"),
        (lambda rows: rows["logits_left"][3:].fill_(float("-inf")), "logits_left is not finite"),
        (lambda rows: rows["logits_class"].fill_(CLASSES), "it names classes beyond the teacher's 5"),
        (lambda rows: rows["logits_class"].fill_(-1), "it names classes beyond the teacher's 5"),
        (lambda rows: rows.update(features=rows["features"].bfloat16()), "features is torch.bfloat16, not torch.float16"),
        (lambda rows: rows.update(features=rows["features"].reshape(2, -1).contiguous()), "features is not of shape (8, 2)"),
        (lambda rows: rows.update(features=rows["features"][:7].clone()), "features is not of shape (8, 2)"),
        (lambda rows: rows.update(features=torch.zeros(10**6)), "it has not the size of 8 rows"),
        (lambda rows: rows.update(features=rows["features"][:, None].clone()), "features is not of shape (8, 2)"),
        (lambda rows: rows.update(other=rows.pop("features")), "it holds ['logits', 'logits_class'"),
    ],
)
def test_forged_rows(change: Callable[[dict[str, Tensor]], object], told: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read(forged(cache, tmp_path / "cache", change))
    assert told in str(raised.value)
    assert "give the deit-kd cache-teacher command again" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"views": 10**9}, "views: must be at most 100,000, got 1000000000"),
        ({"views": -1}, "views: "),
        ({"views": 99_999}, "view_002_steps_000000.safetensors is missing"),
        ({"steps_per_shard": 0}, "steps_per_shard: "),
        ({"steps_per_epoch": 10**6}, "view_000_steps_000004.safetensors is missing"),
        ({"global_batch_size": 10**6}, "it has not the size of 2,000,000 rows"),
        ({"width": 10**6}, "basis.safetensors: cannot be read (mean is not of shape (1000000,))"),
        ({"features": "pca:7"}, "features pca:7, logits top:2 do not fit 6 features and 5 classes"),
        ({"features": "../x"}, "features: String should match pattern"),
        ({"logits": "top:5"}, "do not fit"),
        ({"features": "none", "logits": "none"}, "neither features nor logits"),
        ({"errors": {"logits_kl": float("nan")}}, "errors.logits_kl: must be a finite number"),
        ({"teacher": None}, "teacher: "),
        ({"format": 2}, "format: must be 1, got 2"),
        ({"basis_sha256": None}, "other bytes than the manifest says"),
    ],
)
def test_forged_manifests(change: dict[str, Any], told: str, cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    manifest = {**json.loads((folder / "manifest.json").read_text()), **change}
    del manifest["own_sha256"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "own_sha256": cached_teacher._own_hash(manifest)}))
    with fuzzing.limited(), pytest.raises(UserError) as raised:
        read(folder)
    assert told in str(raised.value)


def test_what_is_no_regular_file(cache: Path, tmp_path: Path) -> None:
    """A FIFO would be waited for."""
    for name in ("manifest.json", "basis.safetensors", "view_000_steps_000000.safetensors"):
        folder = shutil.copytree(cache, tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=f"{name}: is (no regular file|damaged)"):
            read(folder)
    (folder / name).unlink()
    with (folder / name).open("wb") as stream:
        stream.truncate(10**13)
    with fuzzing.limited(), pytest.raises(UserError, match="it has not the size of 8 rows"):
        read(folder)


EXPECTED = {"teacher": "a", "teacher_sha256": "b", "classes": ["c", "d"], "images": "e", "view": [32, None, "bicubic", [0.1, 1.0]]}


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("means") / "means.safetensors"
    told = json.dumps({**EXPECTED, "recipe": "epochs: 3\n"})
    save_file({"class_means": torch.randn(2, WIDTH)}, file, {"deit_kd": told})
    return file


@bounded
@given(st.data())
def test_class_means(means: Path, data: st.DataObject) -> None:
    whole = means.read_bytes()
    try:
        means.write_bytes(data.draw(safetensors(whole)))
        survives(lambda: class_means._read(means, EXPECTED, WIDTH))
    finally:
        means.write_bytes(whole)


def test_forged_class_means(means: Path, tmp_path: Path) -> None:
    assert class_means._read(means, EXPECTED, WIDTH).shape == (2, WIDTH)
    for change, told in (
        ({"class_means": torch.full((2, WIDTH), torch.nan)}, "not finite"),
        ({"class_means": torch.zeros(WIDTH)}, r"of shape \(6,\), not F32 of \(2, 6\)"),
        ({"class_means": torch.zeros(2, WIDTH, dtype=torch.float16)}, "numbers F16"),
        ({"class_means": torch.zeros(3, WIDTH)}, r"of shape \(3, 6\)"),
        ({"class_means": torch.zeros(10**7)}, "MB large, at most"),
        ({"other": torch.zeros(2, WIDTH)}, "not a file of class means"),
    ):
        file = tmp_path / "forged.safetensors"
        save_file(change, file, {"deit_kd": json.dumps(EXPECTED)})
        with pytest.raises(UserError, match=told):
            class_means._read(file, EXPECTED, WIDTH)
    for metadata, told in ((None, "its metadata"), ({"deit_kd": "[" * 10_000}, "its metadata"), ({"deit_kd": "{}"}, "teacher: ")):
        save_file({"class_means": torch.zeros(2, WIDTH)}, file, metadata)
        with pytest.raises(UserError, match=told):
            class_means._read(file, EXPECTED, WIDTH)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="is no regular file"):
        class_means._read(file, EXPECTED, WIDTH)


@bounded
@given(json_bytes({"0123 (16, 3, 28, 28) torch.float32 H100 torch 2": "channels_last"}))
def test_remembered_layouts(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "teacher_layout.json"
    file.write_bytes(content)
    assert set(acceleration._known_layouts(file).values()) <= set(acceleration.FORMATS)


ASKED = {"short_side": None, "shard_bytes": 1000, "images": "0" * 64}
PACKED = {**ASKED, "files": {"classes.json": [3, "0" * 64], "train-000000.tar": [10, "1" * 64]}}


@bounded
@given(json_bytes(PACKED))
def test_notes_of_pack(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "packed"
    folder.mkdir(exist_ok=True)
    (folder / packed.FILE).write_bytes(content)
    survives(lambda: packed.is_whole(folder, ASKED))


REPORT = {"weights": "x", "architecture": "resnet10t", "parameters": 5, "top1": 50.0, "per_class": [{"class": "a", "recall": None}]}
RUN = {"data": {"train_images": 240, "name": "images"}, "hardware": "CPU", "commit": "unknown"}


@bounded
@given(json_bytes(REPORT), json_bytes(RUN))
def test_reports_and_runs_of_a_grid(tmp_path_factory: pytest.TempPathFactory, content: bytes, run: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "reports"
    (folder / "seed=0/student").mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_bytes(content)
    (folder / "seed=0/run.json").write_bytes(run)
    (folder / "seed=0/student/README.md").write_text("a card")
    survives(lambda: report._is_report(folder))
    survives(lambda: grid._facts(folder, [{"seed": "0"}]))


def test_layouts_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "teacher_layout.json"
    assert acceleration._known_layouts(file) == {}
    file.write_text('{"a": "channels_last"}')
    assert acceleration._known_layouts(file) == {"a": "channels_last"}
    file.write_text('{"a": "channels_last", "b": 5}')
    assert acceleration._known_layouts(file) == {}
