"""A teacher whose answers are read from a folder that `deit-kd cache-teacher` wrote: no weights, no forward.

manifest.json                             teacher, formats, geometry, and what the images depend on (deit_kd/teacher_cache/write.py writes it)
basis.safetensors                         the principal components, with features of the format pca:R
view_VVV_steps_SSSSSS.safetensors         rows of so many steps from step S of epoch V on, in the epoch's order
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deit_kd.errors import UserError
from deit_kd.files.atomic import sha256, write_json
from deit_kd.files.documents import MEGABYTE, Document, must_be_a_file, parse_json, read_bytes, short
from deit_kd.models import teacher_formats
from deit_kd.models.teacher import TeacherInfo, TeacherOutput
from deit_kd.models.teacher_formats import Basis, decode
from deit_kd.text import for_terminal

if TYPE_CHECKING:
    from deit_kd.data import Batch

FORMAT = 1  # of the folder
HEADER = 64_000  # bytes, at most, before the numbers of a file of rows
REMEDY = "cache the teacher anew, into another folder"
AGAIN = "give the deit-kd cache-teacher command again, which writes what is missing or damaged"


_Count = Annotated[int, Field(ge=1, le=10**7)]
_Numbers = dict[Annotated[str, Field(max_length=100)], float]


class TeacherFacts(Document):
    """What a manifest says of the teacher; see `TeacherInfo`."""

    name: str
    weights: str
    sha256: Annotated[str, Field(max_length=64)]
    license: str
    parameters: Annotated[int, Field(ge=0)]
    num_classes: Annotated[int, Field(ge=1, le=10**6)]
    label_names: list[str] | None


class Manifest(Document):
    """manifest.json."""

    format: Literal[1]
    own_sha256: str
    teacher: TeacherFacts
    ran: str = ""
    img_size: Annotated[int, Field(ge=1, le=10**5)] | None
    width: Annotated[int, Field(ge=1, le=10**6)]
    views: Annotated[int, Field(ge=1, le=10**5)]
    features: Annotated[str, Field(pattern=f"^({teacher_formats.FEATURES})$")]
    logits: Annotated[str, Field(pattern=f"^({teacher_formats.LOGITS})$")]
    basis_sha256: str | None = None
    global_batch_size: _Count
    steps_per_epoch: _Count
    steps_per_shard: _Count
    bytes_per_image: _Count
    seconds_per_image: Annotated[float, Field(ge=0)]
    errors: _Numbers
    accuracy: _Numbers = {}
    validation: dict[str, Any] = {}
    stream: dict[str, Any]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        number = self.teacher.num_classes
        if teacher_formats.number_of(self.features) > self.width or teacher_formats.number_of(self.logits) >= number:
            raise ValueError(
                f"features {self.features}, logits {self.logits} do not fit {self.width} features and {number} classes"
            )
        if self.features == self.logits == "none":
            raise ValueError("it holds neither features nor logits")
        return self


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
        facts = self.manifest["teacher"]
        known = {field.name: facts[field.name] for field in fields(TeacherInfo)}
        self.info = TeacherInfo(**known | {"label_names": facts["label_names"] and tuple(facts["label_names"])})
        self.num_classes, self.width, self.img_size = self.info.num_classes, self.manifest["width"], self.manifest["img_size"]
        self.views: int = self.manifest["views"]
        self.taps = ("pooled",)
        for name, wanted in (("features", features), ("logits", logits)):
            if wanted and self.manifest[name] == "none":
                raise UserError(
                    f"teacher.cache={folder}: holds no {name}, which the recipe compares; cache them into another folder"
                )
        there = set(os.listdir(folder))
        if missing := next((name for name in map(_name_of, shards(self.manifest)) if name not in there), None):
            raise UserError(f"teacher.cache={folder}: {missing} is missing; {AGAIN}")
        basis = read_basis(folder, self.manifest)
        self.register_buffer("basis_mean", None if basis is None else basis.mean, persistent=False)
        self.register_buffer("basis_components", None if basis is None else basis.components, persistent=False)
        self._at: tuple[int, int] | None = None
        self._rows: dict[str, Tensor] = {}

    @property
    def live(self) -> None:
        """None: no network runs."""
        return

    @property
    def cache(self) -> CachedTeacher:
        """Itself."""
        return self

    def answer(self, batch: Batch) -> TeacherOutput:
        """See `AnyTeacher`."""
        output: TeacherOutput = self(batch.cached_teacher)
        return output

    def read(self, epoch: int, start: int, count: int) -> dict[str, Tensor]:
        """See `deit_kd.data.loader.TeacherCacheReader`. The file is mapped into memory, and checked when it is opened.

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
        return TeacherOutput(nothing if logits is None else logits, features, {"pooled": features})

    def probe(self, image: Tensor) -> TeacherOutput:
        """What has the shapes of its output for an image [1,3,H,W]."""
        features = image.new_zeros(len(image), self.width)
        return TeacherOutput(image.new_zeros(len(image), self.num_classes), features, {"pooled": features})

    def facts(self) -> dict[str, Any]:
        """What run.json says of the cache."""
        digest = hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()
        return {key: self.manifest[key] for key in ("views", "features", "logits", "errors", "ran")} | {"manifest_sha256": digest}

    def describe(self) -> str:
        """A line for people."""
        stored = self.manifest
        return f"not run: read from {self.folder}, {self.views} views, features {stored['features']}, logits {stored['logits']}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a cache.

    Raises:
        UserError: it is not there, or not one that this version reads.
    """
    file = folder / "manifest.json"
    if not os.path.lexists(file):
        raise UserError(f"teacher.cache={folder}: has no manifest.json; deit-kd cache-teacher makes one")
    content = read_bytes(file, REMEDY, 16 * MEGABYTE)
    parse_json(content, str(file), Manifest, REMEDY)
    manifest: dict[str, Any] = json.loads(content)
    if manifest.pop("own_sha256") != _own_hash(manifest):
        raise UserError(f"teacher.cache={folder}: manifest.json is damaged; {REMEDY}")
    return {"ran": "", "validation": {}, "accuracy": {}, **manifest}  # of caches that were made before these were noted


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json."""
    write_json(folder / "manifest.json", {**manifest, "own_sha256": _own_hash(manifest)}, indent=1)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def shards(manifest: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(view, first step) of every file of rows."""
    firsts = range(0, manifest["steps_per_epoch"], manifest["steps_per_shard"])
    return ((view, first) for view in range(manifest["views"]) for first in firsts)


def _name_of(shard: tuple[int, int]) -> str:
    return f"view_{shard[0]:03d}_steps_{shard[1]:06d}.safetensors"


def shard_file(folder: Path, view: int, first: int) -> Path:
    """Where the rows of a shard are."""
    return folder / _name_of((view, first))


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
    formats, classes = (manifest["features"], manifest["logits"]), manifest["teacher"]["num_classes"]
    layout = teacher_formats.layout(formats, manifest["width"], classes)
    count = shard_steps(manifest, first) * manifest["global_batch_size"]
    size = count * sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    if not os.path.lexists(file):
        return "is missing"
    if not file.is_file() or not size < file.stat().st_size <= size + HEADER:
        return f"is damaged, or of another cache: it has not the size of {count:,} rows"
    wanted = {name: (dtype, (count, *shape)) for name, (dtype, shape) in layout.items()}
    rows = _read_tensors(file, wanted)
    if isinstance(rows, str):
        return f"is damaged, or of another cache: {rows}"
    if _metadata(file) != shard_metadata(rows, view, first):
        return "is damaged, or of another cache: its hash is not that of its rows"
    chosen = rows.get("logits_class")
    if chosen is not None and not 0 <= int(chosen.min()) <= int(chosen.max()) < classes:
        return f"is damaged: it names classes beyond the teacher's {classes}"
    return rows


def _read_tensors(file: Path, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor] | str:
    """The tensors of a file that holds exactly these, finite; or what is wrong. Shapes are looked at before numbers are read."""
    try:
        with safe_open(file, "pt") as content:
            names = set(content.keys())
            if names != wanted.keys():
                return f"it holds {short(sorted(names))}, not {sorted(wanted)}"
            for name, (_, shape) in wanted.items():
                if tuple(content.get_slice(name).get_shape()) != shape:
                    return f"{name} is not of shape {shape}"
            tensors = {name: content.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        return for_terminal(str(error))[:200]
    for name, (dtype, _) in wanted.items():
        if tensors[name].dtype != dtype:
            return f"{name} is {tensors[name].dtype}, not {dtype}"
        if dtype.is_floating_point and not tensors[name].isfinite().all():
            return f"{name} is not finite"
    return tensors


def _metadata(file: Path) -> dict[str, str] | None:
    with safe_open(file, "pt") as content:
        stated: dict[str, str] | None = content.metadata()
        return stated


def read_basis(folder: Path, manifest: Mapping[str, Any]) -> Basis | None:
    """The principal components of a cache that has some.

    Raises:
        UserError: they are not there, or damaged.
    """
    rank, width = teacher_formats.number_of(manifest["features"]), manifest["width"]
    if not rank:
        return None
    file = folder / "basis.safetensors"
    must_be_a_file(file, REMEDY, 4 * width * (rank + 1) + HEADER)
    found: dict[str, Tensor] | str = "other bytes than the manifest says"
    if sha256(file) == manifest.get("basis_sha256"):
        found = _read_tensors(file, {"mean": (torch.float32, (width,)), "components": (torch.float32, (rank, width))})
    if isinstance(found, str):
        raise UserError(f"{file}: cannot be read ({found}); {REMEDY}")
    return Basis(found["mean"].clone(), found["components"].clone())
