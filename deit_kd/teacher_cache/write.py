"""Writes a teacher's logits and features of a recipe's training images, view by view, so that later students need no teacher.

A view of an image is the image in an epoch of the recipe's own stream: its crop, its colors, what is erased, its partner
in mixing and the ratio are functions of (seed, epoch, index). Epoch e of a run from a cache of M views is epoch e mod M of that stream, so a mixed image
is itself the view that the teacher saw, and the cache is exact under mixup and cutmix.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from deit_kd.data import EvaluationLoader, LoaderConfig, Source, TrainLoader
from deit_kd.data.build import loader_config
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.data.sources.base import split_holdout
from deit_kd.data.transforms import evaluation_transform
from deit_kd.errors import UserError
from deit_kd.evaluation.metrics import measure
from deit_kd.files.atomic import sha256, write_tensors
from deit_kd.files.outputs import claimed
from deit_kd.models import Teacher, cached_teacher, teacher_formats
from deit_kd.models.teacher_formats import Basis
from deit_kd.recipe import Recipe
from deit_kd.seed import derive_seed
from deit_kd.teacher_cache import identity

ERRORS = {"features_relative_error": "{:.2g} of the features' spread", "logits_kl": "{:.2g} nats of the logits (KL)"}
MEASURED_BATCHES = 4  # at least, before size and time are reported
DEVICE_BATCH = {"cpu": 64, "cuda": 256}  # images a forward, by default


def write_cache(
    recipe: Recipe,
    teacher: Teacher,
    sources: tuple[Source, Source],
    folder: Path,
    accelerator: Accelerator,
    *,
    views: int,
    formats: tuple[str, str],
    ran: str,
    device_batch_size: int | None = None,
    shard_bytes: int = 64_000_000,
) -> None:
    """Writes a cache, or the rest of one; every process writes its share of the files.

    Args:
        recipe: of the images; with one teacher.
        teacher: the recipe's, on the device.
        sources: train and val.
        folder: where to.
        accelerator: for autocast, processes and messages.
        views: epochs of the stream.
        formats: of features and logits; see `deit_kd.models.teacher_formats`.
        ran: how the teacher was prepared, for people.
        device_batch_size: images in a forward at most.
        shard_bytes: where a file ends.

    Raises:
        UserError: a format that does not fit, a folder with another cache, or too little space on the disk.
    """
    train, val = sources
    if recipe.finetune is not None and recipe.finetune.holdout:
        train, _ = split_holdout(train, recipe.finetune.holdout, derive_seed(recipe.seed, "holdout"))
    teacher_formats.check(*formats, teacher.width, teacher.num_classes)
    with ExitStack() as held:
        _claim(folder, held, accelerator)
        _write(recipe, teacher, (train, val), folder, accelerator, views, formats, ran, device_batch_size, shard_bytes)


def _claim(folder: Path, held: ExitStack, accelerator: Accelerator) -> None:
    """The first process holds the folder, and all end where it cannot."""
    faults: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            held.enter_context(claimed(folder, "deit-kd cache-teacher", _is_cache))
        except UserError as error:
            faults = [str(error)]
    broadcast_object_list(faults)
    if faults[0] is not None:
        raise UserError(faults[0])


def _is_cache(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and bool(cached_teacher.read_manifest(folder))


def _write(
    recipe: Recipe,
    teacher: Teacher,
    sources: tuple[Source, Source],
    folder: Path,
    accelerator: Accelerator,
    views: int,
    formats: tuple[str, str],
    ran: str,
    device_batch_size: int | None,
    shard_bytes: int,
) -> None:
    """`write_cache` in a folder that is claimed; `sources` without what is held out."""
    train, val = sources
    here = loader_config(recipe.data, recipe.run, accelerator, accelerator.print)
    loader = _whole_batches(recipe, train, here, device_batch_size)
    holdout, autocast = recipe.finetune.holdout if recipe.finetune else 0.0, accelerator.mixed_precision
    images = identity.cache_identity(recipe.distillations()[0].teacher, recipe.data, loader, holdout, autocast)
    is_new = [not (folder / "manifest.json").exists()]
    broadcast_object_list(is_new)  # the first process makes it while others may still be looking
    if is_new[0]:
        manifest: dict[str, Any] = {
            "format": cached_teacher.FORMAT,
            "teacher": teacher.info.facts(),
            "ran": ran,
            "img_size": teacher.img_size,
            "width": teacher.width,
            "views": views,
            "features": formats[0],
            "logits": formats[1],
            "global_batch_size": loader.global_batch_size,
            "steps_per_epoch": loader.steps_per_epoch,
            "validation": identity.of_validation(recipe.data, recipe.evaluation, val),
            "stream": images,
            "versions": identity.versions(),
        }
        if accelerator.is_main_process:
            manifest |= _measured(teacher, loader, formats, folder, accelerator, shard_bytes)
            _report(manifest, list(cached_teacher.shards(manifest)), folder, accelerator)
        manifest["accuracy"] = _accuracy(
            teacher,
            EvaluationLoader(val, evaluation_transform(recipe.data, recipe.evaluation), here, loader.micro_batch_size),
            accelerator,
        )
        if accelerator.is_main_process:
            cached_teacher.write_manifest(folder, manifest)
        accelerator.wait_for_everyone()
    manifest = cached_teacher.read_manifest(folder)
    identity.must_agree(folder, manifest["stream"], images, "give another --output, or set these as they were")
    asked = {"views": views, "features": formats[0], "logits": formats[1]}
    if other := [f"--{key} {manifest[key]}, not {value}" for key, value in asked.items() if manifest[key] != value]:
        raise UserError(f"--output {folder}: holds a cache with {', '.join(other)}; give another folder")
    todo = _missing(manifest, folder, accelerator)
    if not is_new[0] and accelerator.is_main_process:
        _report(manifest, todo, folder, accelerator)
    _write_shards(manifest, todo, teacher, loader, formats, folder, accelerator)


def _whole_batches(recipe: Recipe, train: Source, here: LoaderConfig, device_batch_size: int | None) -> TrainLoader:
    """Every process makes whole global batches, in even pieces that the device holds."""
    batch = min(recipe.global_batch_size, len(train))
    most = device_batch_size or DEVICE_BATCH.get(here.device.type, 64)
    pieces = [n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most and batch // n % 2 == 0]
    return TrainLoader(
        train,
        choose_augmentation(recipe.data, recipe.augmentation, recipe.run, here.device),
        recipe.augmentation,
        LoaderConfig(here.device, 1, 0, here.workers, here.on_bad_image, here.warn),
        num_classes=len(train.class_names),
        seed=recipe.seed,
        global_batch_size=batch,
        accumulation_steps=pieces[0] if pieces else 1,
    )


def _answers(
    teacher: Teacher, loader: TrainLoader, accelerator: Accelerator, view: int, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features [b,E], logits [b,K]) of each micro-batch, on the device."""
    for batch in loader.epoch(view, steps.start, steps.stop):
        with accelerator.autocast():
            output = teacher(batch.images)
        yield output.features, output.logits


def _accuracy(teacher: Teacher, loader: EvaluationLoader, accelerator: Accelerator) -> dict[str, float]:
    """The teacher's top1 and top5 over the validation images, if it knows their labels."""
    if teacher.num_classes != len(loader.source.class_names) or len(loader.source) < accelerator.num_processes:
        return {}
    return measure(lambda images: {"": teacher(images).logits}, loader, accelerator, "teacher_")


def _measured(
    teacher: Teacher, loader: TrainLoader, formats: tuple[str, str], folder: Path, accelerator: Accelerator, shard_bytes: int
) -> dict[str, Any]:
    """Bytes and seconds an image, what the formats lose, and where files end; measured on some batches of the first view.

    Principal components are fitted on three quarters of these images, as many as four times their number if there are so many; what is
    lost is measured on the others.
    """
    wanted = max(4 * teacher_formats.number_of(formats[0]) * 4 // 3, MEASURED_BATCHES * loader.micro_batch_size)
    count = min(-(-wanted // loader.micro_batch_size), loader.steps_per_epoch * loader.accumulation_steps)
    batches = islice(_answers(teacher, loader, accelerator, 0, range(loader.steps_per_epoch)), count)
    answers, started, timed = [], time.perf_counter(), 0
    for features, logits in tqdm(batches, "measuring", count, delay=2, leave=False, disable=None):
        answers.append((features.cpu(), logits.cpu()))
        if len(answers) == 1 < count:  # the first batch also starts workers
            started = time.perf_counter()
        else:
            timed += len(features)
    seconds = (time.perf_counter() - started) / timed
    features, logits = (torch.cat(parts) for parts in zip(*answers, strict=True))
    fitted, basis, hashes = len(features) * 3 // 4, None, {}
    if formats[0].startswith("pca:"):
        basis = teacher_formats.fit_basis(features[:fitted], teacher_formats.number_of(formats[0]))
        write_tensors(basis._asdict(), folder / "basis.safetensors", {"format": "pt"})
        hashes["basis_sha256"] = sha256(folder / "basis.safetensors")
    others = slice(fitted if len(features) - fitted > 1 else 0, None)
    rows = teacher_formats.encode(features, logits, formats, basis)
    _must_be_finite(rows, teacher, formats)
    row_bytes = sum(value.numel() * value.element_size() for value in rows.values()) // len(features)
    return {
        "bytes_per_image": row_bytes,
        "seconds_per_image": seconds,
        "errors": teacher_formats.errors(features[others], logits[others], formats, basis),
        "steps_per_shard": max(1, min(loader.steps_per_epoch, shard_bytes // (row_bytes * loader.global_batch_size))),
        **hashes,
    }


def _must_be_finite(rows: dict[str, Tensor], teacher: Teacher, formats: tuple[str, str]) -> None:
    if not all(value.isfinite().all() for value in rows.values()):
        raise UserError(
            f"teacher {teacher.info.name}: its answers do not fit --features {formats[0]} --logits {formats[1]}; use float32"
        )


def _missing(manifest: dict[str, Any], folder: Path, accelerator: Accelerator) -> list[tuple[int, int]]:
    """(view, first step) of every missing or damaged file, the same list on all processes; each checks its share."""
    mine = list(cached_teacher.shards(manifest))[accelerator.process_index :: accelerator.num_processes]
    quiet = None if accelerator.is_main_process else True
    found = [
        (view, first)
        for view, first in tqdm(mine, "checking what is there", delay=2, leave=False, disable=quiet)
        if isinstance(cached_teacher.read_shard(cached_teacher.shard_file(folder, view, first), manifest, view, first), str)
    ]
    return sorted(gather_object(found))


def _report(manifest: dict[str, Any], todo: list[tuple[int, int]], folder: Path, accelerator: Accelerator) -> None:
    """Prints what will be written, how large it is and how long it takes.

    Raises:
        UserError: the disk has less space.
    """
    batch, row, processes = manifest["global_batch_size"], manifest["bytes_per_image"], accelerator.num_processes
    images = manifest["steps_per_epoch"] * batch
    left = sum(cached_teacher.shard_steps(manifest, first) for _, first in todo) * batch
    hours = left * manifest["seconds_per_image"] / processes / 3600
    lost = ", ".join(ERRORS[name].format(value) for name, value in manifest["errors"].items())
    accelerator.print(
        f"teacher {manifest['teacher']['name']}, {manifest['views']} views of {images:,} images\n"
        f"stored  features {manifest['features']}, logits {manifest['logits']}: {row:,} bytes an image, "
        f"{manifest['views'] * images * row / 1e9:,.3g} GB; lost in it, as measured: {lost}\n"
        f"to do   {len(todo):,} of {sum(1 for _ in cached_teacher.shards(manifest)):,} files, {left * row / 1e9:,.3g} GB, about {hours:,.2g} hours "
        f"on {processes} process{'es' if processes > 1 else ''}",
        flush=True,
    )
    free = shutil.disk_usage(folder).free
    if free < left * row:
        raise UserError(
            f"--output {folder}: {left * row / 1e9:,.3g} GB are needed, {free / 1e9:,.3g} GB are free; free some, give another folder, or "
            "store less with --views, --features and --logits"
        )


def _write_shards(
    manifest: dict[str, Any],
    todo: list[tuple[int, int]],
    teacher: Teacher,
    loader: TrainLoader,
    formats: tuple[str, str],
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Writes these files, each process its share."""
    basis = cached_teacher.read_basis(folder, manifest)
    basis = basis and Basis(*(each.to(accelerator.device) for each in basis))
    own = todo[accelerator.process_index :: accelerator.num_processes]
    count = sum(cached_teacher.shard_steps(manifest, first) for _, first in own) * loader.global_batch_size
    quiet = None if accelerator.is_main_process else True
    with tqdm(total=count, desc="caching", unit="image", delay=2, disable=quiet) as bar:
        for view, first in own:
            pieces = []  # on the device, which is not waited for before the file is full
            steps = range(first, first + cached_teacher.shard_steps(manifest, first))
            for features, logits in _answers(teacher, loader, accelerator, view, steps):
                pieces.append(teacher_formats.encode(features, logits, formats, basis))
                bar.update(len(features))
            rows = {name: torch.cat([piece[name] for piece in pieces]).cpu() for name in pieces[0]}
            _must_be_finite(rows, teacher, formats)
            write_tensors(rows, cached_teacher.shard_file(folder, view, first), cached_teacher.shard_metadata(rows, view, first))
    accelerator.wait_for_everyone()
    accelerator.print(f"{folder}: whole; train with teacher.cache={folder}")
