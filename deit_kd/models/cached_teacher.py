"""A teacher whose answers are read from a folder that `deit-kd cache-teacher` wrote: no weights, no forward.

manifest.json                             teacher, formats, geometry, and what the images depend on (deit_kd/teacher_cache.py writes it)
basis.safetensors                         the principal components, with features of the format pca:R
view_VVV_steps_SSSSSS.safetensors         rows of so many steps from step S of epoch V on, in the epoch's order
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deit_kd.errors import UserError
from deit_kd.models.teacher import Teacher, TeacherInfo, TeacherOutput
from deit_kd.models.teacher_formats import Basis, decode

FORMAT = 1  # of the folder
AGAIN = "give the deit-kd cache-teacher command again, which writes what is missing or damaged"


class CachedTeacher(nn.Module):
    """Stands where a `Teacher` does, and is asked for rows of its memory instead of images.

    Args:
        folder: the cache.
        features: whether features are wanted of it.
        logits: likewise.

    Raises:
        UserError: no cache, not whole, or without what is wanted.
    """

    basis_mean: Tensor
    basis_components: Tensor

    def __init__(self, folder: Path, features: bool = True, logits: bool = True):
        super().__init__()
        self.folder, self.manifest = folder, read_manifest(folder)
        told = self.manifest["teacher"]
        self.info = TeacherInfo(**told | {"label_names": told["label_names"] and tuple(told["label_names"])})
        self.num_classes, self.width, self.img_size = self.info.num_classes, self.manifest["width"], self.manifest["img_size"]
        self.views: int = self.manifest["views"]
        self.taps = ("pooled",)
        for name, wanted in (("features", features), ("logits", logits)):
            if wanted and self.manifest[name] == "none":
                raise UserError(
                    f"teacher.cache={folder}: holds no {name}, which the recipe compares; cache them into another folder"
                )
        there = set(os.listdir(folder))
        for view, first in shards(self.manifest):
            if (name := shard_file(folder, view, first).name) not in there:
                raise UserError(f"teacher.cache={folder}: {name} is missing; {AGAIN}")
        basis = read_basis(folder, self.manifest)
        self.register_buffer("basis_mean", None if basis is None else basis.mean, persistent=False)
        self.register_buffer("basis_components", None if basis is None else basis.components, persistent=False)
        self._at: tuple[int, int] | None = None
        self._rows: dict[str, Tensor] = {}

    def read(self, epoch: int, start: int, count: int) -> dict[str, Tensor]:
        """See `deit_kd.data.loader.Memory`. The file is mapped into memory, and checked when it is opened.

        Raises:
            UserError: the file is damaged.
        """
        batch = self.manifest["global_batch_size"]
        first = start // batch // self.manifest["steps_per_shard"] * self.manifest["steps_per_shard"]
        if (epoch, first) != self._at:
            file = shard_file(self.folder, epoch, first)
            rows = read_shard(file, self.manifest, epoch, first)
            if isinstance(rows, str):
                raise UserError(f"{file}: {rows}; {AGAIN}")
            self._at, self._rows = (epoch, first), rows
        start -= first * batch
        return {name: value[start : start + count] for name, value in self._rows.items()}

    def forward(self, rows: Mapping[str, Tensor]) -> TeacherOutput:
        """What the teacher said, from rows [B,...] of `read` on its device; a part that is not stored has no columns."""
        basis = None if self.basis_mean is None else Basis(self.basis_mean, self.basis_components)
        some = next(iter(rows.values()))
        with torch.no_grad(), torch.autocast(some.device.type, enabled=False):
            features, logits = decode(rows, self.num_classes, basis)
        nothing = torch.empty(len(some), 0, device=some.device)
        features = nothing if features is None else features
        return TeacherOutput(nothing if logits is None else logits, features, None, {"pooled": features})

    def probe(self, image: Tensor) -> TeacherOutput:
        """What has the shapes of its output for an image [1,3,H,W]."""
        features = image.new_zeros(len(image), self.width)
        return TeacherOutput(image.new_zeros(len(image), self.num_classes), features, None, {"pooled": features})

    def told(self) -> dict[str, Any]:
        """What a run records of it."""
        digest = hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()
        return {key: self.manifest[key] for key in ("views", "features", "logits", "errors", "ran")} | {"manifest_sha256": digest}

    def describe(self) -> str:
        """A line for people."""
        told = self.manifest
        return f"not run: read from {self.folder}, {self.views} views, features {told['features']}, logits {told['logits']}"


AnyTeacher: TypeAlias = Teacher | CachedTeacher


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a cache.

    Raises:
        UserError: it is not there, or not one that this version reads.
    """
    try:
        content: Any = json.loads((folder / "manifest.json").read_text())
        if content["format"] != FORMAT:
            reason = f"has format {content['format']}, this version reads {FORMAT}"
        elif content.pop("own_sha256") == _own_hash(content):
            return dict(content)
        else:
            reason = "manifest.json is damaged"
    except FileNotFoundError:
        reason = "has no manifest.json; deit-kd cache-teacher makes one"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"manifest.json cannot be read ({error})"
    raise UserError(f"teacher.cache={folder}: {reason}")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json, whole or not at all."""
    part = folder / ".manifest.json.tmp"
    with part.open("w") as writing:
        writing.write(json.dumps({**manifest, "own_sha256": _own_hash(manifest)}, indent=1) + "\n")
        writing.flush()
        os.fsync(writing.fileno())
    part.replace(folder / "manifest.json")


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def shards(manifest: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(view, first step) of every file of rows."""
    firsts = range(0, manifest["steps_per_epoch"], manifest["steps_per_shard"])
    return [(view, first) for view in range(manifest["views"]) for first in firsts]


def shard_file(folder: Path, view: int, first: int) -> Path:
    """Where the rows of a shard are."""
    return folder / f"view_{view:03d}_steps_{first:06d}.safetensors"


def shard_steps(manifest: Mapping[str, Any], first: int) -> int:
    """How many steps a shard has; the last one of an epoch may have fewer."""
    return int(min(manifest["steps_per_shard"], manifest["steps_per_epoch"] - first))


def shard_metadata(rows: Mapping[str, Tensor], view: int, first: int) -> dict[str, str]:
    """What a shard says of itself, in one entry: several would come in any order, and two files of the same rows differ."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(f"{name} {rows[name].dtype} {tuple(rows[name].shape)} ".encode())
        digest.update(rows[name].contiguous().view(torch.uint8).numpy().data)
    return {"deit_kd": json.dumps({"view": view, "first_step": first, "sha256": digest.hexdigest()})}


def read_shard(file: Path, manifest: Mapping[str, Any], view: int, first: int) -> dict[str, Tensor] | str:
    """Rows of a shard, mapped into memory; or what is wrong with them."""
    try:
        with safe_open(file, "pt") as content:
            rows = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  # it is no mapping
            stated = content.metadata()
    except (SafetensorError, OSError) as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
    count = shard_steps(manifest, first) * manifest["global_batch_size"]
    if any(len(value) != count for value in rows.values()) or stated != shard_metadata(rows, view, first):
        return "is damaged, or of another cache"
    return rows


def read_basis(folder: Path, manifest: Mapping[str, Any]) -> Basis | None:
    """The principal components of a cache that has some.

    Raises:
        UserError: they are not there.
    """
    if not manifest["features"].startswith("pca:"):
        return None
    file = folder / "basis.safetensors"
    try:
        if hashlib.sha256(file.read_bytes()).hexdigest() != manifest["basis_sha256"]:
            raise SafetensorError("other bytes than the manifest says")
        with safe_open(file, "pt") as content:
            return Basis(content.get_tensor("mean").clone(), content.get_tensor("components").clone())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); cache the teacher anew, into another folder") from None
