"""The protocol of a source of images, images in memory, and parts of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from deit_kd.data.decode import Jpeg, as_jpeg, as_pixels, decode, orientation
from deit_kd.errors import UserError

Split = Literal["train", "val"]


class Source(Protocol):
    """Images and labels of one split."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # [N] int
    name: str  # what this is, as a card may say it
    origin: str  # where it lies, for messages
    left_out: str  # files that are not read, as `3 .heic`; empty for none
    upright: bool  # images are turned as their EXIF orientation says

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """A path, or another way to find image `index`, for messages."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An RGB image and its label."""

    def encoded(self, index: int) -> bytes | None:
        """The file of an image; None where pixels are held."""


def pixels(source: Source, index: int) -> Tensor:
    """[3,H,W] uint8 of an image, which `source[index]` would give as an image of Pillow's."""
    content = source.encoded(index)
    return as_pixels(source[index][0]) if content is None else decode(content, source.upright)


def pixels_or_jpeg(source: Source, index: int) -> Tensor | Jpeg:
    """The file of an image that the device can decode; else its `pixels`."""
    content = source.encoded(index)
    if content is None:
        return as_pixels(source[index][0])
    return as_jpeg(content, source.upright) or decode(content, source.upright)


class ArraySource:
    """Images held in memory: uint8 [N,H,W] or [N,H,W,3]."""

    left_out, upright = "", False

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str, origin: str):
        self.images, self.labels, self.class_names = images, labels, tuple(class_names)
        self.name, self.origin = name, origin

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:  # noqa: D102
        return f"image {index} of {self.origin}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])

    def encoded(self, index: int) -> None:  # noqa: D102
        return None


class Subset:
    """Some images of another source."""

    def __init__(self, whole: Source, indices: np.ndarray):
        self.whole, self.indices = whole, indices
        self.class_names, self.labels, self.name, self.origin = whole.class_names, whole.labels[indices], whole.name, whole.origin
        self.left_out, self.upright = whole.left_out, whole.upright

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:  # noqa: D102
        return self.whole.where(int(self.indices[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[int(self.indices[index])]

    def encoded(self, index: int) -> bytes | None:  # noqa: D102
        return self.whole.encoded(int(self.indices[index]))


def split_holdout(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(the rest, the held out). Of each class the rounded share is held out, but never all of it, drawn by the seed.

    Raises:
        UserError: the share is less than an image of every class.
    """
    rng, held = np.random.default_rng(seed), []
    for label in np.unique(source.labels):
        own = rng.permutation(np.flatnonzero(source.labels == label))
        held += own[: min(round(share * len(own)), len(own) - 1)].tolist()
    if not held:
        raise UserError(f"{source.origin}: holding out {share:g} of each class is less than an image; raise finetune.holdout")
    chosen = np.zeros(len(source), dtype=bool)
    chosen[held] = True
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def turned(source: Source, most: int = 64) -> int:
    """How many of some images, drawn from all, have an EXIF orientation by which viewers turn them."""
    some = np.random.default_rng(0).permutation(len(source))[:most]
    found = 0
    for index in some.tolist():
        try:
            content = source.encoded(index)
            found += content is not None and orientation(content) in range(2, 9)
        except Exception:  # the loader names what cannot be read
            continue
    return found
