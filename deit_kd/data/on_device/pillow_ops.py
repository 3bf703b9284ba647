"""Pillow's image operations on batches of 8-bit images, each sample with its own argument, on any device.

Images are [N,C,H,W] uint8 with C = 3, arguments [N] or [N,6] float64. Results are those of Pillow 13: equal, but for affine transforms and
blurring, which it computes in another precision and which may differ by one gray level here and there. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance: from the degenerate image (factor 0) through the image (1) and on, in float32, cut off as C casts."""
    start = degenerate.float()
    mixed = start + factor.float().view(-1, 1, 1, 1) * (images.float() - start)
    return mixed.clamp_(0, 255).to(torch.uint8)


def gray(images: Tensor) -> Tensor:
    """[N,1,H,W] uint8: mode L."""
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]


def color(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Color."""
    return blend(gray(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Contrast: about the rounded mean of the gray image."""
    pixels = gray(images).flatten(1)
    mean = pixels.sum(1, dtype=torch.int64).double().div_(pixels.shape[1]).add_(0.5).floor_()
    return blend(mean.view(-1, 1, 1, 1), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Brightness."""
    return blend(torch.zeros_like(images[:, :1]), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """ImageEnhance.Sharpness: the degenerate image is smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, but for its border."""
    rows = images.short()
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * images[:, :, 1:-1, 1:-1].short()
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return blend(smooth, images, factor)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """ImageOps.invert."""
    return 255 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """ImageOps.solarize: inverts from the threshold on."""
    return torch.where(images.short() < threshold.short().view(-1, 1, 1, 1), images, 255 - images)


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """Of timm: lightens what is below 128."""
    lighter = (images.short() + added.short().view(-1, 1, 1, 1)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, lighter, images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """ImageOps.posterize to 1 to 8 bits."""
    shift = (8 - bits).to(torch.uint8).view(-1, 1, 1, 1)
    return images >> shift << shift


def histogram(images: Tensor) -> Tensor:
    """[N,C,256] int64."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, values, torch.ones((), dtype=torch.int64, device=images.device).expand_as(values))


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Images through a table [N,C,256]."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _ends(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that occurs, [N,C,1] int64."""
    there = (counts > 0).to(torch.uint8)
    return there.argmax(2, keepdim=True), 255 - there.flip(2).argmax(2, keepdim=True)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """ImageOps.autocontrast."""
    low, high = _ends(histogram(images))
    values = torch.arange(256, device=images.device).expand(*low.shape[:2], 256)
    span = (high - low).double().clamp_(min=1)
    scale = torch.full_like(span, 255.0) / span  # 255.0 / span would multiply by the rounded reciprocal
    table = (values * scale + -low * scale).trunc_().clamp_(0, 255).long()
    return look_up(images, torch.where(high > low, table, values))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """ImageOps.equalize."""
    counts = histogram(images)
    values = torch.arange(256, device=images.device).expand_as(counts)
    _, high = _ends(counts)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, high)) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    return look_up(images, torch.where(step > 0, table, values))  # a single value has step 0 too


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


def affine(images: Tensor, matrix: Tensor, fill: Tensor, bicubic: bool) -> Tensor:
    """Image.transform(AFFINE): what lies at a x + b y + c, d x + e y + f, for the matrix (a b c d e f) in pixels.

    Bicubic is Pillow's cubic with a = -1. Differences are taken as Pillow takes them, so that flat regions stay as they are.

    Args:
        images: [N,3,H,W] uint8.
        matrix: [N,6] float64.
        fill: [3] uint8, of what lies outside.
        bicubic: or bilinear.
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = matrix.double().view(-1, 6, 1, 1).unbind(1)
    out_y = torch.arange(height, device=images.device, dtype=torch.float64).view(1, -1, 1) + 0.5
    out_x = torch.arange(width, device=images.device, dtype=torch.float64).view(1, 1, -1) + 0.5
    at_x, at_y = a * out_x + b * out_y + c, d * out_x + e * out_y + f
    outside = (at_x < 0) | (at_x >= width) | (at_y < 0) | (at_y >= height)
    left, top = (at_x - 0.5).floor(), (at_y - 0.5).floor()
    dx, dy = ((at_x - 0.5 - left).float()[:, None], (at_y - 0.5 - top).float()[:, None])
    pixels, column, row = images.flatten(2), left.int(), top.int()

    def at(offset_y: int, offset_x: int) -> Tensor:
        index = (row + offset_y).clamp_(0, height - 1).mul_(width).add_((column + offset_x).clamp_(0, width - 1))
        taken = pixels.gather(2, index.long().view(count, 1, -1).expand(-1, channels, -1))
        return taken.view(count, channels, height, width).float()

    if bicubic:
        lines = [_cubic([at(y, x) for x in range(-1, 3)], dx) for y in range(-1, 3)]
        values = _cubic(lines, dy)
    else:
        upper, lower = (torch.addcmul(at(y, 0), dx, at(y, 1) - at(y, 0)) for y in (0, 1))
        values = torch.addcmul(upper, dy, lower - upper)
    return torch.where(outside[:, None], fill.view(1, -1, 1, 1), values.clamp_(0, 255).to(torch.uint8))


def _cubic(values: list[Tensor], distance: Tensor) -> Tensor:
    """Between the second and the third of four."""
    v1, v2, v3, v4 = values
    p2 = v3 - v1
    p3 = 2 * (v1 - v2) + v3 - v4
    p4 = v2 - v1 + v4 - v3
    return v2 + distance * (p2 + distance * (p3 + distance * p4))


# By the names that draws give them, beside affine: (images, argument of each) -> images
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "invert": invert,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "posterize": posterize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "gaussian_blur": gaussian_blur,
}
