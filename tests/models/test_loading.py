"""Trained students from wherever they are: files as their authors wrote them, folders, a hub cache; and files that are refused."""

from __future__ import annotations

import argparse
import builtins
import functools
import hashlib
import json
import operator
import os
import runpy
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from yacs.config import CfgNode

import deit_kd
from deit_kd.cli import main
from deit_kd.errors import UserError
from deit_kd.models.loading import read_student
from deit_kd.models.weights import read_weights

SMALL = {"depth": 2, "num_classes": 7}


@pytest.fixture(scope="module")
def conv_stem() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("deit_tiny_convstem_distilled_patch16_224", **SMALL).eval()


def by_authors(student: nn.Module, head: str) -> dict[str, Tensor]:
    names = {"patch_embed.proj.stem.": "conv_embed.conv.", "patch_embed.proj.patches.": "conv_embed.proj.", "head_dist.": head}
    renamed = {}
    for key, value in student.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def simple_recipe(student: nn.Module, folder: Path) -> Path:
    """As the projector paper's code saves it: pickled settings, the optimizer's state, its loss module."""
    model = by_authors(student, "head_conv.")
    loss = {
        "embed.weight": torch.ones(3024, 192),
        "bn_s.running_mean": torch.zeros(3024),
        "bn_s.num_batches_tracked": torch.tensor(3),
    }
    model |= {f"distillation_loss.{key}": value for key, value in loss.items()}
    optimizer = torch.optim.AdamW(student.parameters())
    settings = CfgNode({"MODEL": {"NAME": "tiny"}, "TRAIN": {"LR": 5e-4, "STEPS": [1, 2]}})
    settings.freeze()
    content = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"last": np.int64(3)},
        "max_accuracy": np.float64(77.2),
        "epoch": 299,
        "config": settings,
    }
    torch.save(content, folder / "ckpt_epoch_299.pth")
    return folder / "ckpt_epoch_299.pth"


def vkd(student: nn.Module, folder: Path) -> Path:
    """As VkD saves it: from inside DDP, its orthogonal projector a part of the student."""
    model = by_authors(student, "head_dist.")
    model |= {f"projector.{key}": value for key, value in orthogonal(nn.Linear(8, 24, bias=False)).state_dict().items()}
    content = {"student": {f"module.{key}": value for key, value in model.items()}, "student_ema": None, "epoch": 299}
    torch.save({**content, "args": argparse.Namespace(lr=5e-4, output_dir=Path("there"))}, folder / "latest.pth.tar")
    return folder / "latest.pth.tar"


def deit(student: nn.Module, folder: Path) -> Path:
    """As DeiT's files are, in the format before torch 1.6."""
    torch.save({"model": student.state_dict()}, folder / "deit.pth", _use_new_zipfile_serialization=False)
    return folder / "deit.pth"


def compiled(student: nn.Module, folder: Path) -> Path:
    torch.save({f"module._orig_mod.{key}": value for key, value in student.state_dict().items()}, folder / "compiled.pth")
    return folder / "compiled.pth"


def safetensors(student: nn.Module, folder: Path) -> Path:
    save_file(student.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def ours(student: nn.Module, folder: Path) -> Path:
    """module.safetensors of a checkpoint."""
    tensors = {f"student.{key}": value for key, value in student.state_dict().items()}
    save_file({**tensors, "projectors.0.weight": torch.ones(3, 2)}, folder / "module.safetensors")
    return folder / "module.safetensors"


def images(side: int = 224) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("save", [simple_recipe, vkd, compiled, safetensors, ours])
@torch.inference_mode()
def test_conv_stem_files(save: Callable[..., Path], conv_stem: nn.Module, tmp_path: Path) -> None:
    loaded = deit_kd.load_student(save(conv_stem, tmp_path))
    assert not loaded.training
    assert loaded.pretrained_cfg["architecture"] == "deit_tiny_convstem_distilled_patch16_224"
    assert torch.equal(loaded(images()), conv_stem(images()))


@pytest.mark.parametrize("save", [deit, compiled, safetensors])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "deit_base_distilled_patch16_224"])
@torch.inference_mode()
def test_deits_files(save: Callable[..., Path], name: str, tmp_path: Path) -> None:
    student = timm.create_model(name, depth=1, num_classes=1000, img_size=96).eval()
    loaded = deit_kd.load_student(save(student, tmp_path))
    assert loaded.pretrained_cfg["architecture"] == name
    assert torch.equal(loaded(images(96)), student(images(96)))


@torch.inference_mode()
def test_other_classes_and_sizes(conv_stem: nn.Module, tmp_path: Path) -> None:
    path = simple_recipe(conv_stem, tmp_path)
    loaded = deit_kd.load_student(path, num_classes=3, img_size=160)
    assert loaded(images(160)).shape == (2, 3)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 160, 160)
    position = conv_stem.get_parameter("pos_embed")
    assert torch.equal(loaded.pos_embed[:, :2], position[:, :2])
    assert torch.equal(loaded.pos_embed, resample_abs_pos_embed(position, [10, 10], num_prefix_tokens=2))
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, conv_stem.get_parameter("blocks.1.mlp.fc1.weight"))
    same = deit_kd.load_student(path, img_size=160)
    assert torch.equal(same.head_dist.weight, conv_stem.get_parameter("head_dist.weight"))


@torch.inference_mode()
def test_folders_and_a_hub_cache(conv_stem: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "student"
    save_for_hf(conv_stem, folder, safe_serialization=True)
    revision = "1" * 40
    repository = tmp_path / "hub/models--org--student"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in (folder, str(folder), f"local-dir:{folder}", "hf-hub:org/student", f"hf-hub:org/student@{revision}"):
        assert torch.equal(deit_kd.load_student(source)(images()), conv_stem(images())), source
        adapted = deit_kd.load_student(source, num_classes=3, img_size=160)
        assert adapted(images(160)).shape == (2, 3)
        assert timm.data.resolve_model_data_config(adapted)["input_size"] == (3, 160, 160)
        assert torch.equal(adapted.pos_embed[:, :2], conv_stem.get_parameter("pos_embed")[:, :2])


class Gadget:
    """A pickle that calls something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Dictionary(dict):  # type: ignore[type-arg]
    """A class that nobody knows."""


class State:
    """A pickle that calls something as its state is set."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), Gadget(os.system, "touch ran")


GADGETS = {
    "posix.system": Gadget(os.system, "touch ran"),
    "eval": Gadget(builtins.eval, "open('ran', 'w')"),
    "exec": Gadget(builtins.exec, "open('ran', 'w')"),
    "getattr": Gadget(getattr, "", "upper"),
    "functools.partial": Gadget(functools.partial, os.system, "touch ran"),
    "runpy.run_path": Gadget(runpy.run_path, "ran.py"),
    "operator.attrgetter": Gadget(operator.attrgetter, "x"),
    "torch.hub.load": Gadget(torch.hub.load, "a", "b"),
    "Linear": nn.Linear(2, 2),
    "Dictionary": Dictionary(a=1),
    "system": State(),
}


@pytest.mark.parametrize(("modern", "protocol"), [(True, 2), (False, 2), (True, 4), (False, 5)])
@pytest.mark.parametrize("named", GADGETS)
def test_pickled_objects_are_refused_by_name_and_never_run(
    named: str, modern: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": {"x": torch.ones(2)}, "config": GADGETS[named]}
    torch.save(content, tmp_path / "evil.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=modern)
    with pytest.raises(UserError, match=rf"pickled object \S*{named}, which is not built"):
        deit_kd.load_student(tmp_path / "evil.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_files_that_are_no_weights(conv_stem: nn.Module, tmp_path: Path) -> None:
    def refuse(message: str, path: Path) -> None:
        with pytest.raises(UserError, match=message):
            deit_kd.load_student(path)

    whole = simple_recipe(conv_stem, tmp_path)
    for kept in (0, 10, 1000, whole.stat().st_size // 2, whole.stat().st_size - 10):
        (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:kept])
        refuse("cut.pth: cannot be read as weights", tmp_path / "cut.pth")
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.namelist():
            bomb.writestr(entry, archive.read(entry))
    refuse("unpacks to more", tmp_path / "bomb.pth")
    (tmp_path / "head.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    refuse("cannot be read as weights", tmp_path / "head.safetensors")
    tensors = conv_stem.state_dict()
    torch.save({**tensors, "head.bias": torch.ones(1).expand(1 << 40)}, tmp_path / "wide.pth")
    refuse("head.bias claims 1,099,511,627,776 numbers", tmp_path / "wide.pth")
    torch.save({**tensors, "norm.weight": tensors["norm.weight"] * torch.nan}, tmp_path / "nan.pth")
    refuse("norm.weight is not finite", tmp_path / "nan.pth")
    torch.save({**tensors, "norm.weight": tensors["norm.weight"].double() * 1e39}, tmp_path / "large.pth")
    refuse("norm.weight is not finite in float32", tmp_path / "large.pth")
    for name, value in {"meta": torch.ones(192, device="meta"), "sparse": torch.ones(192).to_sparse()}.items():
        torch.save({**tensors, "norm.weight": value}, tmp_path / f"{name}.pth")
        refuse("norm.weight is a sparse, quantized or empty", tmp_path / f"{name}.pth")
    torch.save(tensors, tmp_path / "new.pth", pickle_protocol=4)
    refuse("no torch checkpoint of pickle protocol 2", tmp_path / "new.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    refuse("no torch checkpoint", tmp_path / "page.pth")
    save_for_hf(conv_stem, tmp_path / "folder", safe_serialization=True)
    save_file({**tensors, "norm.weight": tensors["norm.weight"] * torch.nan}, tmp_path / "folder/model.safetensors")
    refuse("norm.weight is not finite", tmp_path / "folder")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    refuse("holds no tensors", tmp_path / "none.pth")
    refuse("no such file", tmp_path / "nowhere/model.pth")


def test_other_networks_are_refused(conv_stem: nn.Module, tmp_path: Path) -> None:
    def refuse(message: str, tensors: dict[str, Tensor]) -> None:
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(UserError, match=message):
            deit_kd.load_student(tmp_path / "other.pth")

    tensors = conv_stem.state_dict()
    for change in (
        {"blocks.99999999.norm1.weight": torch.ones(192)},
        {"pos_embed": torch.ones(0, 10**10, 192)},
        {"pos_embed": torch.ones(192)},
        {"head.weight": torch.tensor(1.0)},
        {"patch_embed.proj.patches.weight": torch.ones(192, 64, 0, 0)},
    ):
        refuse("is no DeiT-Ti, S or B", {**tensors, **change})
    refuse("is no DeiT-Ti, S or B", {number: torch.ones(2) for number in range(3)})  # type: ignore[misc]
    refuse("is no DeiT-Ti, S or B", timm.create_model("resnet10t").state_dict())
    refuse("has no norm.weight", {key: value for key, value in tensors.items() if key != "norm.weight"})
    refuse(r"norm.weight is \[3\] instead of \[192\]", {**tensors, "norm.weight": torch.ones(3)})
    refuse("blocks.0.ls1.gamma have no place", {**tensors, "blocks.0.ls1.gamma": torch.ones(192)})
    found = read_student(tmp_path / "other.pth")
    assert (found.unexpected, found.arguments) == (("blocks.0.ls1.gamma",), {"num_classes": 7, "depth": 2})
    with pytest.raises(UserError, match="cannot be loaded"):
        deit_kd.load_student("hf-hub:nobody/nothing")


def test_licenses_are_those_that_are_stated(conv_stem: nn.Module, tmp_path: Path) -> None:
    """Not that of timm's own weights of the architecture."""
    assert deit_kd.load_student(simple_recipe(conv_stem, tmp_path)).pretrained_cfg["license"] == "unknown"
    save_for_hf(
        conv_stem, tmp_path / "folder", safe_serialization=True, model_config={"pretrained_cfg": {"license": "cc-by-nc-4.0"}}
    )
    assert deit_kd.load_student(tmp_path / "folder").pretrained_cfg["license"] == "cc-by-nc-4.0"
    config = json.loads((tmp_path / "folder/config.json").read_text())
    config["pretrained_cfg"].pop("license")
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    assert deit_kd.load_student(tmp_path / "folder").pretrained_cfg["license"] == "unknown"
    assert deit_kd.load_student("quickstart").pretrained_cfg["license"] == "apache-2.0"


def test_averaged_weights_where_there_are_no_others(conv_stem: nn.Module, tmp_path: Path) -> None:
    torch.save({"model_ema": conv_stem.state_dict()}, tmp_path / "ema.pth")
    assert torch.equal(deit_kd.load_student(tmp_path / "ema.pth").pos_embed, conv_stem.get_parameter("pos_embed"))


def test_what_is_kept_beside_weights_is_not_built(conv_stem: nn.Module, tmp_path: Path) -> None:
    """Settings become plain dictionaries: not even harmless classes are imported for them."""
    tensors = read_weights(simple_recipe(conv_stem, tmp_path))
    assert {type(value) for value in tensors.values()} == {Tensor}


@torch.inference_mode()
def test_convert(conv_stem: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = simple_recipe(conv_stem, tmp_path)
    (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
    main(["convert", str(source), str(tmp_path / "folder"), "--class-names", str(tmp_path / "names.txt")])
    said = capsys.readouterr().out
    assert "deit_tiny_convstem_distilled_patch16_224 with {'num_classes': 7, 'depth': 2}" in said
    assert said.count("dropped ") == 3
    loaded = deit_kd.load_student(tmp_path / "folder")
    assert torch.equal(loaded(images()), conv_stem(images()))
    assert loaded.pretrained_cfg["label_names"] == list("abcdefg")
    assert ModelCard.load(tmp_path / "folder/README.md").data.library_name == "timm"
    assert f"{hashlib.sha256(source.read_bytes()).hexdigest()}" in (tmp_path / "folder/README.md").read_text()
    torch.save({**conv_stem.state_dict(), "queue": torch.ones(3)}, tmp_path / "more.pth")
    main(["convert", str(tmp_path / "more.pth"), str(tmp_path / "more")])
    assert "unexpected queue" in capsys.readouterr().out
    assert torch.equal(deit_kd.load_student(tmp_path / "more")(images()), conv_stem(images()))
    main(["convert", str(source), str(tmp_path / "folder"), "--class-names", str(tmp_path / "names.txt")])
    assert "unchanged  " in capsys.readouterr().out
    for arguments, message in (
        ([source, tmp_path / "folder"], "is there already, and is not what this command makes"),
        ([tmp_path / "none.pth", tmp_path / "x"], "no such file"),
        ([source, tmp_path / "x", "--class-names", source], "cannot be read"),
        ([source, tmp_path / "x", "seed=1"], "unrecognized arguments: seed=1"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", *map(str, arguments)])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@torch.inference_mode()
def test_a_converted_plain_deit_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    student = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=96).eval()
    main(["convert", str(deit(student, tmp_path)), str(tmp_path / "folder")])
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(theirs(images(96)).logits, student(images(96)))
