"""Augmentation of whole batches on the device, with the random parameters that workers drew for each sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deit_kd.data.on_device.draws import BatchPlan, CannotBeDrawnError, Jpegs, Turn, WorkerTransform
from deit_kd.data.on_device.jpegs import Decoder
from deit_kd.data.on_device.pillow_ops import Taps, blend, gaussian_blur, look_up, resample
from deit_kd.data.transforms import Transform, train_transform
from deit_kd.errors import UserError
from deit_kd.recipe import Augmentation, Data, Run


class OnDevice(NamedTuple):
    """Augmentation in two parts: workers decode, crop, flip and draw the rest; the device applies the rest to whole batches."""

    worker: WorkerTransform
    finish: Finish


def choose_augmentation(data: Data, augmentation: Augmentation, run: Run, device: torch.device) -> Transform | OnDevice:
    """The training transform where `run.augment_on` says; auto is the device if it is a GPU and supports the augmentation.

    Raises:
        UserError: the recipe says device, and its augmentation cannot be done there; or what `train_transform` and `Decoder` refuse.
    """
    chosen = _choose(data, augmentation, run, device)
    if run.decode_on == "device":
        if not isinstance(chosen, OnDevice):
            raise UserError(
                "run.decode_on=device: images are augmented in the workers here; use run.augment_on=device, or run.decode_on=workers"
            )
        if chosen.worker.crop is None:
            raise UserError("run.decode_on=device: crops of padded images are cut in the workers; use run.decode_on=workers")
    return chosen


def _choose(data: Data, augmentation: Augmentation, run: Run, device: torch.device) -> Transform | OnDevice:
    stated, decodes = run.augment_on, run.decode_on == "device"
    if stated == "cpu" or (stated == "auto" and device.type != "cuda"):
        return train_transform(data, augmentation)
    try:
        return OnDevice(WorkerTransform(data, augmentation, decodes), Finish(data, device, decodes))
    except CannotBeDrawnError as error:
        if stated == "auto":
            return train_transform(data, augmentation)
        raise UserError(f"run.augment_on=device: {error}; use run.augment_on=cpu") from None


class Finish:
    """The device's part: the plan's operations, normalization, erasing. Only `Decoder` makes the host wait for the device.

    Raises:
        UserError: what `Decoder` refuses.
    """

    def __init__(self, data: Data, device: torch.device, decodes: bool):
        self.device, size = device, data.img_size
        self.mean, self.std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (data.mean, data.std))
        self.fill = torch.tensor([[min(255.0, round(255 * each))] for each in data.mean], device=device)
        levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
        self.normal = torch.special.ndtri(levels).float().to(device)
        self.places = _scramble(torch.arange(3 * size * size, dtype=torch.int32)).view(3, size, size).to(device)
        self.side = torch.arange(size, device=device)
        self.decoder = Decoder(size, device) if decodes else None

    def __call__(self, images: Tensor | None, plan: BatchPlan) -> Tensor:
        """Images [B,3,H,W] uint8, without those that are yet to be decoded -> all, float32, normalized, on the device.

        Raises:
            UndecodedError: see there.
        """
        numbers = plan.unpack(plan.packed.to(self.device, non_blocking=True))
        images = None if images is None else images.to(self.device, non_blocking=True)
        if plan.jpegs is not None:
            images = self._decode(images, plan.jpegs)
        assert images is not None, "a batch has images"
        if plan.turns:
            images = self._augment(images, plan.turns, numbers)
        normalized = images.div(255).sub_(self.mean).div_(self.std)
        if len(numbers["erased"]):
            erased = numbers["erased"]
            filled = self._erase(normalized.index_select(0, erased), numbers["boxes"], numbers["noise"])
            normalized.index_copy_(0, erased, filled)
        return normalized

    def _augment(self, images: Tensor, turns: list[Turn], numbers: dict[str, Tensor]) -> Tensor:
        """In each turn the images of one form lie behind each other, and are changed in place."""
        taps = Taps(numbers["matrices"], numbers["weights"], images.shape[2]) if len(numbers["matrices"]) else None
        tables, factors, sigmas = 0, 0, 0
        resampled = 0
        for turn, order in zip(turns, numbers["order"], strict=False):
            images = images.index_select(0, order)
            looked_up, blended = turn.tables + turn.autocontrast + turn.equalize, turn.color + turn.contrast + turn.sharpness
            parts = images.split([turn.idle, looked_up, blended, turn.resampled, turn.gaussian_blur])
            if looked_up:
                look_up(parts[1], numbers["tables"][tables : tables + turn.tables], turn.autocontrast, turn.equalize)
            if blended:
                blend(parts[2], numbers["factors"][factors : factors + blended], turn.color, turn.contrast)
            if taps and turn.resampled:
                resample(parts[3], taps, resampled, self.fill)
            if turn.gaussian_blur:
                parts[4].copy_(gaussian_blur(parts[4], numbers["sigmas"][sigmas : sigmas + turn.gaussian_blur]))
            tables, factors, sigmas = tables + turn.tables, factors + blended, sigmas + turn.gaussian_blur
            resampled += turn.resampled
        return images.index_select(0, numbers["order"][-1])

    def _decode(self, images: Tensor | None, jpegs: Jpegs) -> Tensor:
        """The whole batch, decoded; `images` is None where all are JPEGs."""
        assert self.decoder is not None, "workers send JPEGs only to a device that decodes"
        decoded = self.decoder(jpegs)
        if images is None:
            return decoded
        members, others = (each.to(self.device, non_blocking=True) for each in (jpegs.members, jpegs.others))
        whole = decoded.new_empty(len(members) + len(others), *decoded.shape[1:])
        return whole.index_copy_(0, members, decoded).index_copy_(0, others, images)

    def _erase(self, images: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
        """Fills boxes with standard normal noise. It depends on seed and place alone, so it is the same however a batch is cut, on any device.

        The noise takes 65,536 values, the midpoints of equal shares of the distribution.
        """
        row, column = ((self.side >= boxes[..., :1]) & (self.side < boxes[..., 1:])).unbind(1)
        inside = (row[:, :, None] & column[:, None])[:, None]
        drawn = _scramble(self.places + noise.view(-1, 1, 1, 1)) & 0xFFFF
        return torch.where(inside, self.normal[drawn.long()], images)


def _scramble(number: Tensor) -> Tensor:
    """A bijection of int32 whose result looks random (the constants are those of Chris Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        number = number ^ ((number >> shift) & (2 ** (32 - shift) - 1))
        number = number * factor
    return number ^ ((number >> 16) & 0xFFFF)
