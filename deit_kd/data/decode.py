"""Encoded images to pixels: Pillow's, by a faster decoder where pixels are wanted as a tensor."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

MOST_PIXELS = 2**20  # of a file that the device decodes: 256 of them take 0.8 GB there


class Jpeg(NamedTuple):
    """A file that the device can decode."""

    content: Tensor  # [bytes] uint8
    height: int
    width: int


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


def as_jpeg(content: bytes) -> Jpeg | None:
    """The file, if it is one that decoders of GPUs take whole batches of: small, complete, baseline, in grey or YCbCr.

    nvJPEG decodes progressive files one after another, on the host. Only the header is read here, and the last two bytes: a file
    without the marker of its end may be cut off, and `decode` knows what that means.

    Raises:
        Exception: as `decode_image`, of headers.
    """
    with _open(content) as image:
        info, components = image.info, [each[0] for each in getattr(image, "layer", ())]
        plain = (image.mode == "L" and len(components) == 1) or (image.mode == "RGB" and components == [1, 2, 3])
        if image.format != "JPEG" or not plain or "progressive" in info or info.get("adobe_transform", 1) != 1:
            return None
        if image.width * image.height > MOST_PIXELS or not content.endswith(b"\xff\xd9"):
            return None
        return Jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), image.height, image.width)


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
