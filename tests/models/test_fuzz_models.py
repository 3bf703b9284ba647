"""Damaged configurations and weights of networks: loading succeeds or ends in one line."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

from deit_kd.models.loading import architecture_of, load_student
from deit_kd.models.teacher import load_teacher
from fuzzing import bounded, damaged, json_bytes, survives

SIDE = 32


@functools.cache
def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "student":
        arguments: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": SIDE, "num_classes": 3}
        return timm.create_model("deit_tiny_distilled_patch16_224", **arguments)
    return timm.create_model("cifar_resnet20", num_classes=3)


@functools.cache
def deit() -> nn.Module:
    """One that a file of weights alone describes."""
    return timm.create_model("deit_tiny_patch16_224", depth=1, img_size=SIDE, num_classes=3)


@functools.cache
def pth(modern: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": deit().state_dict(), "epoch": 3, "lr": 0.1}, stream, _use_new_zipfile_serialization=modern)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in ("student", "cnn"):
        made[kind] = tmp_path_factory.mktemp(kind)
        save_config_for_hf(network(kind), str(made[kind] / "config.json"), {"label_names": ["a", "b", "c"]})
        (made[kind] / "model.safetensors").write_bytes(save(network(kind).state_dict()))
    return made


def use(folder: Path) -> None:
    student = load_student(folder)
    size = student.pretrained_cfg["input_size"]
    if max(size) <= SIDE:
        assert student(torch.zeros(1, *size)).shape == (1, student.num_classes)


def ask(folder: Path, weights: str) -> None:
    teacher = load_teacher(folder, 3, weights=weights)
    size = teacher.model.pretrained_cfg["input_size"]
    if max(size) <= SIDE:
        assert teacher(torch.zeros(1, *size)).logits.shape == (1, 3)


def test_the_right_ones_load(folders: dict[str, Path], tmp_path: Path) -> None:
    for folder in folders.values():
        use(folder)
        assert load_teacher(folder, 3).info.label_names == ("a", "b", "c")
    (tmp_path / "deit.pth").write_bytes(pth(True))
    assert load_student(tmp_path / "deit.pth").num_classes == 3


@pytest.mark.parametrize("kind", ["student", "cnn"])
@bounded
@given(data=st.data())
def test_config(kind: str, folders: dict[str, Path], data: st.DataObject) -> None:
    file = folders[kind] / "config.json"
    right = file.read_bytes()
    try:
        file.write_bytes(data.draw(json_bytes(json.loads(right))))
        survives(lambda: use(folders[kind]))
        survives(lambda: ask(folders[kind], "pretrained"))
        survives(lambda: ask(folders[kind], "random"))
        survives(lambda: architecture_of(folders[kind]))
    finally:
        file.write_bytes(right)


@bounded
@given(data=st.data())
def test_safetensors(folders: dict[str, Path], data: st.DataObject) -> None:
    file = folders["student"] / "model.safetensors"
    right = file.read_bytes()
    header = 8 + int.from_bytes(right[:8], "little")
    parts = st.tuples(damaged(right[:header]), st.just(right[header:]))  # most bytes are numbers, which may be any
    try:
        file.write_bytes(data.draw(st.one_of(parts.map(b"".join), damaged(right))))
        survives(lambda: use(folders["student"]))
        survives(lambda: load_student(file))
        survives(lambda: load_teacher("cifar_resnet20", weights=str(file)))
    finally:
        file.write_bytes(right)


@bounded
@given(data=st.data())
def test_torch_files(folders: dict[str, Path], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["zip", "legacy", "pickle"]))
    right = pth(kind != "legacy")
    if kind == "pickle":
        content = with_pickle(right, lambda pickle: data.draw(damaged(pickle)))
    else:  # the beginning, or what comes anywhere
        beginning = st.tuples(damaged(right[:9000]), st.just(right[9000:])).map(b"".join)
        content = data.draw(st.one_of(damaged(right), beginning))
    file = folders["student"] / "weights.pth"
    file.write_bytes(content)
    survives(lambda: load_student(file))
    survives(lambda: load_teacher("deit_tiny_patch16_224", weights=str(file)))


def with_pickle(right: bytes, change: Any) -> bytes:
    """The same zip file with another data.pkl."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(right)) as before, zipfile.ZipFile(changed, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return changed.getvalue()
