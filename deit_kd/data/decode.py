"""Encoded images to pixels: Pillow's, by a faster decoder where pixels are wanted as a tensor.

Every picture of the package is opened here, by one of `FORMATS`, whatever its name is. An animated picture gives its first frame.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from deit_kd.files.warn import warn

MOST_PIXELS = 2**20  # of a file that the device decodes: 256 of them take 0.8 GB there
MOST_BYTES = 600_000_000  # of a file: 179 million pixels, which Pillow takes at most, are no larger
MOST_ELONGATED = 200  # long side / short side; a picture of 1 x 60,000 pixels would be resized to 256 x 15,000,000
# Formats of pictures whose decoders read bytes and do nothing else: PostScript would start a program, others run without bounds.
_WANTED = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # AVIF and others depend on how Pillow was built
SUFFIXES = frozenset(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)
ORIENTATION = 0x0112  # of EXIF
_SIXTEEN = "16 bits a sample"  # in an image's info: Pillow reads PNGs of 16-bit colors as 8 bits, and does not say so
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow says of metadata, transparency and pictures half as large as it takes; a line of each file would hide the rest.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Jpeg(NamedTuple):
    """A file that the device can decode."""

    content: Tensor  # [bytes] uint8
    height: int
    width: int


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that may be a picture.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (a FIFO would wait for ever), or too large for a picture.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"is {status.st_size / 1e6:,.0f} MB large, a picture has at most {MOST_BYTES // 10**6} MB")
    return Path(path).read_bytes()


def decode_image(content: bytes, upright: bool = False) -> Image.Image:
    """The file of an image as Pillow's image in mode RGB.

    Args:
        content: the file.
        upright: turned and mirrored as its EXIF orientation says. TIFF files always are: Pillow does so.

    Raises:
        Exception: of many types, where Pillow refuses the file.
    """
    with _open(content) as image:
        pixels = rgb(image)
        turn = _UPRIGHT.get(_orientation(image)) if upright else None
        return pixels if turn is None else pixels.transpose(turn)


def decode(content: bytes, upright: bool = False) -> Tensor:
    """Pixels [3,H,W] uint8 of `decode_image`, whose memory is [H,W,3].

    Pillow opens every file, so that its checks (a damaged header, too many pixels) hold for all. A JPEG in color or gray is then
    decoded by torchvision: bit for bit the same pixels, faster, without Pillow's copy. Pillow decodes damaged files.

    Raises:
        Exception: as `decode_image`.
    """
    with _open(content) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if plain and not (upright and _orientation(image) in _UPRIGHT):
            try:
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
            except RuntimeError:
                pass
    return as_pixels(decode_image(content, upright))


def as_jpeg(content: bytes, upright: bool = False) -> Jpeg | None:
    """The file, if it is one that decoders of GPUs take whole batches of: small, complete, baseline, in gray or YCbCr, not to be turned.

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
        if upright and _orientation(image) in _UPRIGHT:
            return None
        return Jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), image.height, image.width)


def orientation(content: bytes) -> int:
    """EXIF's number for how a viewer turns the file. 1 is as stored; TIFF files give 1, because Pillow turns them.

    Raises:
        Exception: as `decode_image`, of headers.
    """
    with _open(content) as image:
        return 1 if image.format == "TIFF" else _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # metadata that cannot be read is none
        return 1


def as_pixels(image: Image.Image) -> Tensor:
    """[3,H,W] uint8, whose memory is [H,W,3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; Pillow alone would clip 16-bit gray at 255, and has no scale for 32-bit integers and floats."""
    image.load()
    bits = _bits(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # of a PGM, scaled to 16 bits
        image = Image.fromarray((np.asarray(image) >> max(0, bits - 8)).clip(max=255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; convert it to 8 or 16 bits")
    converted = image if image.mode == "RGB" else image.convert("RGB")
    if bits == 16 and 0 < np.asarray(converted).max() < 16:
        warn(
            "pictures of 16 bits a pixel whose values all lie below 4,096 (12 bits, perhaps) are read as near black, as 16 bits have it; "
            "multiply their values by 16, or store 8 bits"
        )
    return converted


def _bits(image: Image.Image) -> int:
    """Of a sample, where a file says more than Pillow's mode: 16-bit PNG and TIFF, and TIFF of 12 bits, which Pillow puts in 16."""
    stated = getattr(image, "tag_v2", {}).get(258)
    if isinstance(stated, tuple) and stated and all(isinstance(each, int) and 8 < each <= 16 for each in stated):
        return max(stated)
    if image.mode == "I" and image.format == "PPM":
        return 16
    return 16 if image.mode.startswith("I;16") or image.info.get(_SIXTEEN) else 8


def _open(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # Pillow names the buffer, which says nothing
        raise UnidentifiedImageError(f"is no picture of a format that is read here: {', '.join(FORMATS)}") from None
    if image.format == "PNG":
        image.info[_SIXTEEN] = content[24:25] == b"\x10"
    if max(image.size) > MOST_ELONGATED * min(image.size):
        raise ValueError(f"is {image.width:,} x {image.height:,} pixels: a side over {MOST_ELONGATED} times the other; crop it")
    return image
