"""A teacher's class means: the mean of its pooled features over the training images of each class, which norm_direction reads.

Wang et al. (2023) take them with the teacher in evaluation mode from randomly cropped and flipped training images, and so does this:
crop and flip are the recipe's, without colors, erasing and mixing. Sums are in float64 and the crops the same each time, so that two
passes give one file.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from deit_kd.data import EvaluationLoader, LoaderConfig, Source
from deit_kd.data.loader import SKIPPED
from deit_kd.data.sources.fingerprint import fingerprint
from deit_kd.data.transforms import train_transform
from deit_kd.errors import UserError
from deit_kd.files.atomic import write_tensors
from deit_kd.files.documents import MEGABYTE, Document, must_be_a_file, parse_json
from deit_kd.models import AnyTeacher, Teacher
from deit_kd.recipe import Augmentation, Data, Distill
from deit_kd.seed import derive_seed
from deit_kd.text import for_terminal

OTHER = {  # what a file must agree on, and of what it is if it does not
    "teacher": "another teacher",
    "teacher_sha256": "other weights of this teacher",
    "classes": "other classes",
    "images": "other training images",
    "view": "another crop or image size",
}


def load_or_compute(
    file: Path,
    data: Data,
    augmentation: Augmentation,
    teacher: AnyTeacher,
    source: Source,
    accelerator: Accelerator,
    loader_config: LoaderConfig,
    global_batch_size: int,
) -> Tensor:
    """[K,E] float32 from `file` when it is there, else computed and written to it.

    Args:
        file: of class means.
        data: how images are normalized.
        augmentation: how they are cropped and flipped.
        teacher: whose features are averaged.
        source: the training images.
        accelerator: of this process; each computes its share.
        loader_config: of this process.
        global_batch_size: images that all processes take at a time, but no process more than 256.

    Raises:
        UserError: the file is of another teacher, label set, data or crop; or a class has no readable image.
    """
    if not os.path.lexists(file):
        network = teacher.live
        assert network, "a cache has no answers to these images; a recipe with one names a file"
        accelerator.print(f"computing the class means of {teacher.info.name} over {len(source):,} images, for {file.name}")
        means = _compute(data, augmentation, network, source, accelerator, loader_config, global_batch_size)
        if accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            stated = json.dumps(_identity(data, augmentation, teacher, source))
            write_tensors({"class_means": means}, file, {"deit_kd": stated})  # one entry: several come in any order
        accelerator.wait_for_everyone()
    return _read(file, _identity(data, augmentation, teacher, source), teacher.width).to(accelerator.device)


def stated_means(
    output: Path,
    data: Data,
    augmentation: Augmentation,
    source: Source,
    accelerator: Accelerator,
    loader_config: LoaderConfig,
    global_batch_size: int,
    distill: Distill,
    teacher: AnyTeacher,
) -> Tensor | None:
    """The class means [K,E] that one distillation reads, those of `auto` kept in `output`; None: the distillation reads none.

    Raises:
        UserError: the stated file is not there; see `load_or_compute`.
    """
    if distill.class_means is None or not distill.feature_weight:
        return None
    file = Path(distill.class_means)
    if distill.class_means == "auto":
        file = output / f"class_means_{teacher.info.sha256[:8]}.safetensors"
    else:
        must_fit(data, augmentation, distill, None, None)
    return load_or_compute(file, data, augmentation, teacher, source, accelerator, loader_config, global_batch_size)


def must_fit(data: Data, augmentation: Augmentation, distill: Distill, teacher: AnyTeacher | None, source: Source | None) -> None:
    """Refuses a stated file that is not there, or of another teacher or data where these are given.

    Raises:
        UserError: the file is missing or does not fit.
    """
    if distill.class_means in (None, "auto") or not distill.feature_weight:
        return
    file = Path(str(distill.class_means))
    if not file.exists():
        raise UserError(f"distill.class_means={file}: no such file; make it with deit-kd class-means, or set it to auto")
    if teacher is not None and source is not None:
        _read(file, _identity(data, augmentation, teacher, source), teacher.width)


@torch.inference_mode()
def _compute(
    data: Data,
    augmentation: Augmentation,
    teacher: Teacher,
    source: Source,
    accelerator: Accelerator,
    loader_config: LoaderConfig,
    global_batch_size: int,
) -> Tensor:
    quiet = replace(augmentation, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
    transform = train_transform(data, quiet)
    batch_size = max(1, min(256, global_batch_size // accelerator.num_processes))
    loader = EvaluationLoader(source, transform, loader_config, batch_size, seed=derive_seed("class means"))
    classes = len(source.class_names)
    sums = torch.zeros(classes, teacher.width, dtype=torch.float64, device=accelerator.device)
    counts = torch.zeros(classes, dtype=torch.float64, device=accelerator.device)
    for images, labels in tqdm(loader, "class means", delay=2, disable=None if accelerator.is_main_process else True):
        features = teacher(images).features.double()
        known = labels != SKIPPED
        if accelerator.device.type == "cuda":  # index_add_ adds in any order there, so that a second pass gave another file
            shares = F.one_hot(labels.clamp_min(0), classes).double() * known[:, None]
            sums, counts = sums + shares.T @ features, counts + shares.sum(0)
        else:
            sums.index_add_(0, labels[known], features[known])
            counts += labels[known].bincount(minlength=classes)
    sums, counts = accelerator.reduce(sums), accelerator.reduce(counts)
    if not sums.isfinite().all():
        raise UserError(f"teacher {teacher.info.name}: features are not finite in {teacher.dtype}; set teacher.precision=float32")
    # A class without an image (of ImageNet's, in a part of ImageNet) keeps a zero mean: no target ever asks for it.
    return (sums / counts.clamp_min(1)[:, None]).float()


def _identity(data: Data, augmentation: Augmentation, teacher: AnyTeacher, source: Source) -> dict[str, Any]:
    """The facts that a file must agree on."""
    aug = augmentation
    crop = aug.crop_scale, aug.crop_padding, aug.horizontal_flip, *(["upright"] if source.upright else [])
    return {
        "teacher": teacher.info.name,
        "teacher_sha256": teacher.info.sha256,
        "classes": list(source.class_names),
        "images": fingerprint(source),
        "view": json.loads(json.dumps([data.img_size, teacher.img_size, aug.interpolation, *crop])),
    }


class _Metadata(Document):
    """The metadata of a file of class means."""

    teacher: str
    teacher_sha256: str
    classes: list[str]
    images: str
    view: list[Any]


def _read(file: Path, expected: dict[str, Any], width: int) -> Tensor:
    remedy = "give another file, or move this one away, and they are computed again"
    shape = (len(expected["classes"]), width)
    must_be_a_file(file, remedy, 4 * math.prod(shape) + 32 * MEGABYTE)
    try:
        with safe_open(file, "pt") as content:
            stated, found = content.metadata() or {}, content.get_slice("class_means")
            found_shape, dtype = tuple(found.get_shape()), found.get_dtype()
            metadata = parse_json(stated.get("deit_kd", ""), f"{file}: its metadata", _Metadata, remedy)
            for key, value in expected.items():
                if getattr(metadata, key) != value:
                    raise UserError(f"{file}: holds class means of {OTHER[key]}; give the file of this recipe, or class_means=auto")
            if (found_shape, dtype) != (shape, "F32"):
                raise UserError(f"{file}: holds numbers {dtype} of shape {found_shape}, not F32 of {shape}; {remedy}")
            means = content.get_tensor("class_means")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a file of class means ({for_terminal(str(error))[:200]}); {remedy}") from None
    if not means.isfinite().all():
        raise UserError(f"{file}: holds class means that are not finite; {remedy}")
    return means
