"""Loaders whose images depend on (seed, epoch, index) alone; workers, processes and resuming do not change them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deit_kd.data.mixing import mix, smooth_one_hot
from deit_kd.data.on_device.augment import OnDevice
from deit_kd.data.on_device.draws import AugmentParams, BatchPlan, Crop, WorkerTransform, make_plan
from deit_kd.data.on_device.jpegs import UndecodedError
from deit_kd.data.sources.base import Source, pixels, pixels_or_jpeg
from deit_kd.data.transforms import Transform
from deit_kd.data.workers import Batches, count_bytes, stack
from deit_kd.errors import UserError
from deit_kd.recipe import Augmentation
from deit_kd.seed import derive_seed

SKIPPED = -1  # the label of an image that evaluation leaves out


@dataclass
class Batch:
    """Images [B,3,H,W] normalized, targets [B,K] soft (mixed and smoothed), labels [B] int, all on the device; and their indices."""

    images: Tensor
    targets: Tensor
    labels: Tensor
    indices: Tensor  # [B] int, in the training set
    epoch: int
    seed: int  # of whatever else is random for this batch
    cached_teacher: dict[str, Tensor] = field(default_factory=dict)  # [B,...], what `TeacherCacheReader` has of these images


class TeacherCacheReader(Protocol):
    """What a teacher's cache holds of the images of some epochs, in their order."""

    views: int  # epochs

    def read(self, epoch: int, start: int, count: int) -> dict[str, Tensor]:
        """Rows [count,...] on the CPU of the images from `start` on, in the order of one of those epochs."""


@dataclass(frozen=True)
class LoaderConfig:
    """How a loader of this process works: its device and share, its workers, and what it does with unreadable images."""

    device: torch.device
    num_processes: int
    process_index: int
    workers: int
    on_bad_image: str  # refuse or skip
    warn: Callable[[str], None]
    patience: float = 60.0  # seconds without a batch after which a line says so
    remedy: str = "remove it, or set data.on_bad_image=skip"  # of an image that cannot be read


_Keys = tuple[int, np.ndarray]  # epoch, and [B,2]: index of each image of a batch, and which view of it in this epoch


class _Item(NamedTuple):
    image: Tensor | AugmentParams | None  # None: cannot be read
    label: int
    fault: str | None  # where and why an image was refused or skipped


class _SeededDataset(Dataset[_Item]):
    """Batches of items (epoch, index, view). The transform's randomness depends on these alone, so that any worker gives the same tensor."""

    def __init__(self, source: Source, transform: Transform | WorkerTransform, seed: int, on_bad_image: str, training: bool):
        self.source, self.transform, self.seed = source, transform, seed
        self.on_bad_image, self.training = on_bad_image, training
        self.read: Callable[[Source, int], Any] = transform.read if isinstance(transform, WorkerTransform) else _image

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: _Keys) -> list[_Item]:
        """The items of a whole batch, by one key."""
        return self.items(keys, self.read)

    def items(self, keys: _Keys, read: Callable[[Source, int], Any]) -> list[_Item]:
        """The items of a batch, whose images `read` reads."""
        return [self._item(keys[0], index, view, read) for index, view in keys[1].tolist()]

    def _item(self, epoch: int, index: int, view: int, read: Callable[[Source, int], Any]) -> _Item:
        fault = None
        for candidate in range(index, index + 100):
            candidate %= len(self.source)
            try:
                image = read(self.source, candidate)
                with _seeded(derive_seed(self.seed, "sample", epoch, index, *([view] if view else []))):
                    return _Item(self.transform(image), int(self.source.labels[candidate]), fault)
            except Exception as error:  # broken files and odd shapes raise many types; none of these images can be used
                said = " ".join(str(error).split()) or type(error).__name__
                reason = "empty file" if _is_empty(self.source.where(candidate)) else said
                fault = fault or f"{self.source.where(candidate)}: cannot be read ({reason})"
                if self.on_bad_image == "refuse" or not self.training:
                    return _Item(None, SKIPPED, fault)
        return _Item(None, SKIPPED, fault)


def _image(source: Source, index: int) -> Image.Image:
    return source[index][0]


def _is_empty(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == 0


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms use. Outside of worker processes the caller's random state is restored afterwards."""
    alone = torch.utils.data.get_worker_info() is not None
    before = None if alone else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if before:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def _collate(items: list[_Item]) -> tuple[Tensor | None, BatchPlan | None, Tensor, list[str], bool]:
    """(images, plan of what the device does to them, labels, faults, refused): unreadable images become zeros with the label SKIPPED.

    Images that the device decodes are in the plan alone; no images: all are, or none can be read.
    """
    drawn = [item.image if isinstance(item.image, AugmentParams) else None for item in items]
    images = [item.image.image if isinstance(item.image, AugmentParams) else item.image for item in items]
    first = next((image for image in images if isinstance(image, Tensor)), None)
    stacked = None
    if first is not None:
        held = [image for image in images if not isinstance(image, Crop)]
        stacked = stack([torch.zeros_like(first) if image is None else image for image in held])
    faults = [item.fault for item in items if item.fault]
    refused = any(image is None for image in images)
    return stacked, make_plan(drawn) if any(drawn) else None, torch.tensor([item.label for item in items]), faults, refused


def _batches(dataset: _SeededDataset, loader_config: LoaderConfig) -> Batches:
    def describe(keys: _Keys) -> str:
        return f"{dataset.source.where(int(keys[1][0, 0]))} and the {len(keys[1]) - 1} other images of its batch"

    pin = loader_config.device.type == "cuda"
    return Batches(dataset, _collate, loader_config.workers, pin, loader_config.warn, describe, loader_config.patience)


class TrainLoader:
    """Shuffled, augmented, mixed micro-batches of this process.

    A global batch is a run of the epoch's permutation; it is cut into `accumulation_steps x num_processes` micro-batches. Mixing
    pairs neighbors in the permutation, so that a pair stays together however the global batch is cut.

    With a teacher's cache of M epochs, epoch e has the images of epoch e mod M, and batches hold the cached rows of these.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | OnDevice,
        augmentation: Augmentation,
        loader_config: LoaderConfig,
        *,
        num_classes: int,
        seed: int,
        global_batch_size: int,
        accumulation_steps: int,
        memory: TeacherCacheReader | None = None,
    ):
        self.source, self.augmentation, self.loader_config, self.memory = source, augmentation, loader_config, memory
        self.num_classes, self.seed, self._warned = num_classes, seed, set[str]()
        cuts = accumulation_steps * loader_config.num_processes
        if len(source) < cuts:
            raise UserError(f"{source.origin}: {len(source)} images cannot feed {cuts} micro-batches a step")
        self.global_batch_size = global_batch_size
        if len(source) < global_batch_size:
            self.global_batch_size = len(source) // cuts * cuts
            loader_config.warn(
                f"{source.origin} has {len(source)} images, fewer than global_batch_size {global_batch_size}: "
                f"a step takes {self.global_batch_size}"
            )
        self.micro_batch_size = self.global_batch_size // cuts
        self.accumulation_steps = accumulation_steps
        self.steps_per_epoch = len(source) // self.global_batch_size
        in_worker = transform.worker if isinstance(transform, OnDevice) else transform
        self._finish = transform.finish if isinstance(transform, OnDevice) else None
        self.augments_on = "device" if self._finish else "cpu"
        self.decodes_on = (
            loader_config.device.type if isinstance(in_worker, WorkerTransform) and in_worker.sends_jpegs else "workers"
        )
        self._dataset = _SeededDataset(source, in_worker, seed, loader_config.on_bad_image, True)
        self._batches = _batches(self._dataset, loader_config)

    def shared_bytes(self) -> int:
        """Bytes of shared memory that batches from worker processes take at a time, estimated from one image of the first batch.

        Raises:
            UserError: the image cannot be read, and the recipe refuses such.
        """
        images, plan, _, faults, refused = _collate(self._dataset.items((0, self._order(0)[:1]), self._dataset.read))
        if refused:
            raise UserError(f"{faults[0]}; {self.loader_config.remedy}")
        return count_bytes((images, plan)) * self.micro_batch_size * (2 * self.loader_config.workers + 1)

    def epoch(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Micro-batches of an epoch from optimizer step `start_step` (within the epoch) on, to its end or before `stop_step`.

        Raises:
            UserError: an image cannot be read, and the recipe refuses such.
        """
        place, view = self.loader_config, epoch % self.memory.views if self.memory else epoch
        order = self._order(view)
        starts = [
            step * self.global_batch_size + (micro * place.num_processes + place.process_index) * self.micro_batch_size
            for step in range(start_step, self.steps_per_epoch if stop_step is None else stop_step)
            for micro in range(self.accumulation_steps)
        ]
        keys = [(view, order[start : start + self.micro_batch_size]) for start in starts]
        for start, its_keys, collated in zip(starts, keys, self._batches(keys), strict=True):
            try:
                images, labels = self._finished(*collated)
            except UndecodedError as error:
                images, labels = self._finished(*self._without_what_fails(its_keys, error))
            labels = labels.to(place.device, non_blocking=True)
            targets = smooth_one_hot(labels, self.num_classes, self.augmentation.label_smoothing)
            rng = np.random.default_rng(derive_seed(self.seed, "mix", view, start // self.global_batch_size))
            images, targets = mix(images, targets, self.augmentation, rng)
            indices = self._moved(torch.from_numpy(order[start : start + self.micro_batch_size, 0].copy()))
            seed = derive_seed(self.seed, "batch", epoch, start)
            yield Batch(images, targets, labels, indices, epoch, seed, self._remembered(view, start))

    def _finished(
        self, images: Tensor | None, plan: BatchPlan | None, labels: Tensor, faults: list[str], refused: bool
    ) -> tuple[Tensor, Tensor]:
        """Finishes on the device what `_collate` gave; returns (images, labels)."""
        for fault in faults:
            if refused:
                raise UserError(f"{fault}; {self.loader_config.remedy}")
            self._warn_once(f"{fault}; the next image takes its place")
        if self._finish is not None and plan is not None:
            return self._finish(images, plan), labels
        assert images is not None, "else refused"
        return images.to(self.loader_config.device, non_blocking=True), labels

    def _without_what_fails(
        self, keys: _Keys, error: UndecodedError
    ) -> tuple[Tensor | None, BatchPlan | None, Tensor, list[str], bool]:
        """The same batch, with pixels from workers in place of the files that the device cannot decode."""
        blamed: list[str] = []

        def read(source: Source, index: int) -> Any:
            found = pixels_or_jpeg(source, index)
            if isinstance(found, Tensor) or self._finish.decoder.takes(found):  # type: ignore[union-attr]
                return found
            blamed.append(source.where(index))
            return pixels(source, index)

        collated = _collate(self._dataset.items(keys, read))
        if not blamed:
            raise error.__cause__ or error
        for where in blamed:
            self._warn_once(f"{where}: {error}; the CPU is to")
        return collated

    def _warn_once(self, fault: str) -> None:
        if fault not in self._warned:
            self._warned.add(fault)
            self.loader_config.warn(fault)

    def _remembered(self, view: int, start: int) -> dict[str, Tensor]:
        if self.memory is None:
            return {}
        rows = self.memory.read(view, start, self.micro_batch_size)
        return {name: self._moved(value) for name, value in rows.items()}

    def _moved(self, rows: Tensor) -> Tensor:
        """On the device; pinned before, so that the host does not wait for the copy to a GPU."""
        device = self.loader_config.device
        return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)

    def _order(self, epoch: int) -> np.ndarray:
        """[steps x global batch, 2]: (index, view) in the order of the epoch.

        With repeats R a global batch is R views of its images, each a whole share of the batch apart, so that mixing never pairs an
        image with itself; the epoch then takes 1/R of the images.
        """
        order = np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(len(self.source))
        repeats, batch = self.augmentation.repeats, self.global_batch_size
        if repeats == 1:
            return np.stack([order, np.zeros_like(order)], axis=1)
        share = -(-batch // repeats)
        position = np.arange(self.steps_per_epoch * batch)
        step, within = np.divmod(position, batch)
        return np.stack([order[step * share + within % share], within // share], axis=1)


class EvaluationLoader:
    """Every image once: process p of P takes images p, p+P, ... ; yields (images [B,3,H,W], labels [B]) on the device.

    The last of several batches is filled up with zeros of the label SKIPPED: compiled networks then see one size. A transform with randomness gives the same tensors each time, by `seed`.
    """

    def __init__(self, source: Source, transform: Transform, loader_config: LoaderConfig, batch_size: int, seed: int = 0):
        self.source, self.loader_config, self._warned = source, loader_config, set[str]()
        mine = np.arange(loader_config.process_index, len(source), loader_config.num_processes)
        mine = np.stack([mine, np.zeros_like(mine)], axis=1)
        self._keys = [(0, mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
        self._rows = min(batch_size, len(mine))
        self._batches = _batches(_SeededDataset(source, transform, seed, loader_config.on_bad_image, False), loader_config)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, _, labels, faults, _ in self._batches(self._keys):
            for fault in faults:
                if self.loader_config.on_bad_image == "refuse":
                    raise UserError(f"{fault}; {self.loader_config.remedy}")
                if fault not in self._warned:
                    self._warned.add(fault)
                    self.loader_config.warn(f"{fault}; evaluation leaves it out")
            if images is None:  # a whole batch of unreadable images
                continue
            images, labels = (each.to(self.loader_config.device, non_blocking=True) for each in (images, labels))
            if missing := self._rows - len(labels):
                images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
                labels = torch.cat([labels, labels.new_full((missing,), SKIPPED)])
            yield images, labels
