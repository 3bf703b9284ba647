"""Pillow's image operations on batches of 8-bit images, each sample with its own argument, on any device.

Images are [N,3,H,W] uint8. Operations of one form are done in one call, because launching a kernel costs a GPU's host more than running it:
those of a pixel alone are looked up in tables, those that mix an image with another of itself are blended, those that move pixels are
resampled. Results are those of Pillow 13: equal, but for resampling and blurring, which it computes in another precision and which may differ by
one gray level here and there. Nothing waits for the device.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = 19595, 38470, 7471  # of 65536: what red, green and blue are of mode L


def table(name: str, argument: float) -> np.ndarray:
    """[256] uint8: what becomes of each value under an operation of a pixel alone."""
    values = np.arange(256)
    if name == "invert":
        return (255 - values).astype(np.uint8)
    if name == "solarize":  # inverts from the threshold on
        return np.where(values < int(argument), values, 255 - values).astype(np.uint8)
    if name == "solarize_add":  # of timm: lightens what is below 128
        return np.where(values < 128, np.minimum(values + int(argument), 255), values).astype(np.uint8)
    if name == "posterize":  # to 1 to 8 bits
        return (values >> 8 - int(argument) << 8 - int(argument)).astype(np.uint8)
    assert name == "brightness"  # ImageEnhance blends with black, in float32, and cuts off as C casts
    return np.clip(np.float32(argument) * values.astype(np.float32), 0, 255).astype(np.uint8)


@cache
def autocontrast_tables(device: torch.device) -> Tensor:
    """[256,256,256] uint8: the table of ImageOps.autocontrast for each lowest and highest value."""
    values = torch.arange(256, device=device)
    low, high = values.view(-1, 1, 1), values.view(1, -1, 1)
    span = (high - low).double().clamp_(min=1)
    scale = torch.full_like(span, 255.0) / span  # 255.0 / span would multiply by the rounded reciprocal
    stretched = (values * scale + -low * scale).trunc_().clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, values.to(torch.uint8))


def look_up(images: Tensor, tables: Tensor, autocontrast: int, equalize: int) -> None:
    """Changes images in place: first those of the tables [n,256] uint8, then those of ImageOps.autocontrast, then those of ImageOps.equalize."""
    pixels = images.flatten(2)
    values, known = pixels.long(), len(tables)
    found = [tables[:, None].expand(-1, images.shape[1], -1)] if known else []
    if autocontrast or equalize:
        low, high = torch.aminmax(values[known:], dim=2)
    if autocontrast:
        found.append(autocontrast_tables(images.device)[low[:autocontrast], high[:autocontrast]])
    if equalize:
        found.append(_equalizing(values[known + autocontrast :], high[autocontrast:]))
    torch.gather(found[0] if len(found) == 1 else torch.cat(found), 2, values, out=pixels)


def _equalizing(values: Tensor, highest: Tensor) -> Tensor:
    """The tables [n,C,256] uint8 of ImageOps.equalize for values [n,C,P], the highest of which are given [n,C]."""
    counts = values.new_zeros(*values.shape[:2], 257)
    counts[..., 1:].scatter_add_(2, values, _one(values.device).expand_as(values))
    below = counts.cumsum(2)[..., :256]  # pixels of lower values
    step = below.gather(2, highest[..., None]) // 255
    equalized = ((step >> 1) + below).floor_divide_(step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, equalized, _values(values.device)).to(torch.uint8)  # a single value has step 0 too


def blend(images: Tensor, factors: Tensor, color: int, contrast: int) -> None:
    """Changes images in place as ImageEnhance: first those of Color, then of Contrast, then of Sharpness.

    Each goes from a degenerate image (factor 0) through itself (1) and on, in float32, cut off as C casts.
    """
    full, grays = images.float(), color + contrast
    degenerate = full.clone()
    if grays:
        # Sums of whole numbers below 2^24 are exact in float32.
        gray = (full[:grays] * _gray_weights(images.device)).sum(1, keepdim=True).add_(0.5).floor_()
        degenerate[:color] = gray[:color]
        if contrast:  # about the rounded mean of the gray image
            pixels = gray[0].numel()
            mean = gray[color:].sum((1, 2, 3), dtype=torch.float64).mul_(1 / pixels)
            degenerate[color:grays] = (
                mean.add_(0.5 + 0.25 / pixels).floor_().view(-1, 1, 1, 1)
            )  # safe from the reciprocal's rounding
    if grays < len(images):  # smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, but for the border
        sharp = full[grays:]
        total = F.avg_pool2d(sharp, 3, 1, divisor_override=1).add_(sharp[:, :, 1:-1, 1:-1], alpha=4)
        degenerate[grays:, :, 1:-1, 1:-1] = total.mul_(1 / 13).add_(13.5 / 26).floor_()
    images.copy_(full.sub_(degenerate).mul_(factors.view(-1, 1, 1, 1)).add_(degenerate).clamp_(0, 255))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """ImageFilter.GaussianBlur: three box blurs of a fractional radius below 3 along rows, then along columns; edges are repeated."""
    sigma = sigma.float()  # Pillow's arithmetic from here to the weights is of C's floats
    length = torch.sqrt(12.0 * (sigma * sigma / 3).double() + 1.0).float()
    whole = ((length - 1.0) / 2.0).floor()
    part = ((2 * whole + 1) * (whole * (whole + 1) - 3.0 * sigma * sigma / 3)) / (
        6 * (sigma * sigma / 3 - (whole + 1) * (whole + 1))
    )
    radius = whole + part
    weight = (2**24 / (radius * 2 + 1)).long()
    edge = (2**24 - (2 * radius.long() + 1) * weight) // 2
    distance = torch.arange(-3, 4, device=images.device).abs()
    inside = distance <= radius.long()[:, None]
    taps = torch.where(inside, weight[:, None], torch.where(distance == radius.long()[:, None] + 1, edge[:, None], 0))
    for _ in range(2):
        for _ in range(3):
            size = images.shape[3]
            padded = images.index_select(3, torch.arange(-3, size + 3, device=images.device).clamp_(0, size - 1)).long()
            total = torch.full_like(images, 2**23, dtype=torch.int64)
            for place in range(7):
                total += padded[..., place : place + size] * taps[:, place].view(-1, 1, 1, 1)
            images = (total >> 24).to(torch.uint8)
        images = images.transpose(2, 3)
    return images


def interpolation_weights(kind: str) -> np.ndarray:
    """[4,4] float32: coefficients of d^3, d^2, d and 1 for each of four neighbors, between the second and third of which a point lies at d.

    Bicubic is Pillow's with a = -1.
    """
    if kind == "bicubic":
        return np.array([[-1, 1, -1, 1], [2, -2, 1, -1], [-1, 0, 1, 0], [0, 1, 0, 0]], np.float32)
    return np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, -1, 1, 0], [0, 1, 0, 0]], np.float32)


class Taps:
    """Where pixels of resampled images come from: Image.transform(AFFINE) of square images, each with a matrix and an interpolation.

    Args:
        matrices: [N,2,3] float64: the place in an image, x and y in pixels less a half, of (x, y, 1).
        weights: [N,4,4] float32, see `interpolation_weights`.
        size: pixels a side.
    """

    def __init__(self, matrices: Tensor, weights: Tensor, size: int):
        place = torch.bmm(matrices, _grid(size, matrices.device).expand(len(matrices), -1, -1))  # [N,2,P]
        self.outside = (place.clamp(-0.5, math.nextafter(size - 0.5, 0)) != place).any(1)  # [N,P]
        corner = place.floor()
        distance = place.sub_(corner).float()[..., None]
        neighbors = (corner.int()[..., None] + _offsets(matrices.device)).clamp_(0, size - 1)  # [N,2,P,4]
        self.indices = (neighbors[:, 1, :, :, None] * size).add(neighbors[:, 0, :, None]).flatten(2)  # [N,P,16]
        cubic, square, linear, constant = weights[:, :, None, None].unbind(1)
        along = (cubic * distance).add_(square).mul_(distance).add_(linear).mul_(distance).add_(constant)  # [N,2,P,4]
        self.shares = (along[:, 1, :, :, None] * along[:, 0, :, None]).flatten(2)  # [N,P,16]


def resample(images: Tensor, taps: Taps, start: int, fill: Tensor) -> None:
    """Changes images in place by their taps, which begin at `start`; `fill` [3,1] float32 is what lies outside.

    Neighbors count by their difference from one of them, so that flat regions stay as they are.
    """
    pixels, end = images.flatten(2), start + len(images)
    index = taps.indices[start:end].long().flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
    neighbors = pixels.float().gather(2, index).view(*pixels.shape, 16)
    nearest = neighbors[..., 5]
    values = (neighbors - nearest[..., None]).mul_(taps.shares[start:end, None]).sum(3).add_(nearest).clamp_(0, 255)
    pixels.copy_(torch.where(taps.outside[start:end, None], fill, values))


@cache
def _grid(size: int, device: torch.device) -> Tensor:
    """[3,P] float64: the centers (x, y, 1) of an image's pixels."""
    center = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    y, x = torch.meshgrid(center, center, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).flatten(1)


@cache
def _offsets(device: torch.device) -> Tensor:
    return torch.arange(-1, 3, dtype=torch.int32, device=device)


@cache
def _values(device: torch.device) -> Tensor:
    return torch.arange(256, device=device)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.int64, device=device)


@cache
def _gray_weights(device: torch.device) -> Tensor:
    return torch.tensor(GRAY, dtype=torch.float32, device=device).view(-1, 1, 1) / 65536
