"""The identity of a teacher's cache: all that its images and its teacher depend on, which must be the same in a run that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deit_kd.data import Source, TrainLoader
from deit_kd.data.sources.fingerprint import of_images
from deit_kd.errors import UserError
from deit_kd.files.atomic import sha256
from deit_kd.models import CachedTeacher
from deit_kd.models.loading import file_of
from deit_kd.recipe import Data, Evaluation, Teacher
from deit_kd.text import for_terminal

# Where data come from and how labels are smoothed changes no image; the data themselves are compared.
NO_MATTER = ("data.source", "data.num_classes", "data.train_images", "data.label_column", "augmentation.label_smoothing")
TEACHER, WEIGHTS, FILE = "teacher.name", "teacher.weights", "sha256 of the teacher's file"
PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy")


def cache_identity(teacher: Teacher, data: Data, loader: TrainLoader, holdout: float, autocast: str) -> dict[str, Any]:
    """The identity, one plain value a name.

    Args:
        teacher: as the recipe states it.
        data: the recipe's.
        loader: of the training images.
        holdout: share of the training images that is held out; 0 is none.
        autocast: of Accelerate: no, bf16 or fp16.
    """
    micro, aug = loader.micro_batch_size, loader.augmentation
    keys = {f"data.{key}": value for key, value in asdict(data).items()}
    keys |= {f"augmentation.{key}": value for key, value in asdict(aug).items()}
    mixes = (aug.mixup or aug.cutmix) and aug.mixup_prob
    follows = {"no": "float32"}.get(autocast, f"{autocast} autocast")
    file = file_of(teacher.name) if teacher.weights == "pretrained" else Path(teacher.weights)
    found = {
        "seed": loader.seed,
        "global_batch_size": loader.global_batch_size,
        # Pairs that are mixed are neighbors in a micro-batch; of an odd one, the last stays alone, wherever the batch is cut.
        "micro-batches": "any" if not mixes else "even" if micro % 2 == 0 else micro,
        "finetune.holdout": holdout,
        **{key: value for key, value in keys.items() if key not in NO_MATTER},
        "augmented on": loader.augments_on,  # colors within a gray level of each other, and other noise
        "decoded on": loader.decodes_on,  # workers, or the device's type: a GPU's decoder gives other pixels
        "teacher.img_size": teacher.img_size,
        "teacher.precision": follows if teacher.precision == "auto" else teacher.precision,
        TEACHER: teacher.name,
        WEIGHTS: teacher.weights,
        FILE: sha256(file) if file is not None and file.is_file() else None,
        **of_images(loader.source),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def versions() -> dict[str, str]:
    """Versions of the packages that make images."""
    return {name: version(name) for name in PACKAGES}


def must_agree(folder: Path, cached: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Refuses a cache of other images or another teacher.

    Raises:
        UserError: every difference, with both values.
    """
    names = list(dict.fromkeys([*cached, *wanted]))
    # Files are compared where both have one: a folder may lie elsewhere. Else the name must do.
    by_file = None not in (cached.get(FILE), wanted.get(FILE))
    passed = (TEACHER, WEIGHTS) if by_file else (FILE,)
    optional = "hash of the sizes of files"  # tables have none
    if None in (cached.get(optional), wanted.get(optional)):
        passed = (*passed, optional)
    different = [name for name in names if name not in passed and cached.get(name) != wanted.get(name)]
    lines = [f"{_short(name)} was {_short(cached.get(name))}, is {_short(wanted.get(name))}" for name in different[:8]]
    lines += [f"{len(different) - 8} more"] if len(different) > 8 else []
    if lines:
        raise UserError(f"teacher.cache={folder}: was made for another stream or teacher ({'; '.join(lines)}); {remedy}")


def check_identity(teacher: CachedTeacher, wanted: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Refuses a cache whose `cache_identity` is not the `wanted` one; warns where other versions of packages made the images.

    Raises:
        UserError: every difference, with both values.
    """
    remedy = "cache this recipe into another folder, or set these as they were"
    must_agree(teacher.folder, teacher.manifest["stream"], wanted, remedy)
    ours, theirs = versions(), teacher.manifest["versions"]
    if other := [f"{name} {_short(theirs.get(name))}, here {ours[name]}" for name in PACKAGES if ours[name] != theirs.get(name)]:
        warn(f"teacher.cache={teacher.folder}: was made with {'; '.join(other)}, whose images may differ a little")


def of_validation(data: Data, evaluation: Evaluation, source: Source) -> dict[str, Any]:
    """What a teacher's accuracy depends on, beside the teacher: the validation images and how they are cropped."""
    view = [data.img_size, data.mean, data.std, evaluation.crop_pct, evaluation.interpolation]
    view += ["upright"] if source.upright else []
    found = {"view": view, **of_images(source)}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _short(value: Any) -> str:
    text = for_terminal(str(value)[:10_000])
    return text if len(text) <= 70 else f"{text[:60]}... ({len(text)} characters)"
