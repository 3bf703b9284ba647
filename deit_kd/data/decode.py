"""Encoded images to pixels: Pillow's, by a faster decoder where pixels are wanted as a tensor."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg


def decode_image(content: bytes) -> Image.Image:
    """The file of an image as Pillow's image in mode RGB.

    Raises:
        Exception: of many types, what Pillow has against the file.
    """
    with _open(content) as image:
        return rgb(image)


def decode(content: bytes) -> Tensor:
    """Pixels [3,H,W] uint8 of `decode_image`, whose memory is [H,W,3].

    Pillow opens every file, so that what it refuses (a damaged header, too many pixels) is refused alike. Of a JPEG in colour or grey
    torchvision's decoder then takes the pixels: bit for bit the same, faster, and without Pillow's copy. Damaged files are left to Pillow.

    Raises:
        Exception: as `decode_image`.
    """
    with _open(content) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            try:
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
            except RuntimeError:
                pass
        return as_pixels(rgb(image))


def as_pixels(image: Image.Image) -> Tensor:
    """[3,H,W] uint8, whose memory is [H,W,3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; Pillow alone would clip 16-bit grey at 255, and has no scale for 32-bit integers and floats."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # Pillow names the buffer, which says nothing
        raise UnidentifiedImageError("cannot identify image file") from None
