"""The IDX files of MNIST and its kin, read with bounds: nothing is unpacked beyond what the header declares."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from deit_kd.errors import UserError
from deit_kd.files.documents import must_be_a_file

MOST_BYTES = 500_000_000  # MNIST's 60,000 images are 47 million


def read_idx(images: Path, labels: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(images [N,H,W] uint8, labels [N] uint8) of two files, which may be .gz.

    Raises:
        UserError: a file is missing, damaged, of another rank or size, or a label is none of the classes.
    """
    pixels, numbers = _read(images, 3), _read(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(f"{images}: holds {len(pixels):,} images, {labels.name} {len(numbers):,} labels; fetch both files again")
    if numbers.max() >= classes:
        raise UserError(
            f"{labels}: label {numbers.max()} is none of the {classes} classes, 0 to {classes - 1}; fetch the file again"
        )
    return pixels, numbers


def _read(path: Path, rank: int) -> np.ndarray:
    """Two zero bytes, the type 8 (bytes), the number of dimensions, their sizes of 4 bytes each, then the values."""
    remedy = "fetch the file again"
    must_be_a_file(path, remedy, MOST_BYTES)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4 + 4 * rank)
            if head[:4] != bytes([0, 0, 8, rank]) or len(head) < 4 + 4 * rank:
                raise ValueError(f"no IDX file of bytes with {rank} dimensions")
            shape = struct.unpack(f">{rank}i", head[4:])
            count = math.prod(shape)
            if min(shape) < 1 or max(shape[1:], default=1) > 4096 or count > MOST_BYTES:
                raise ValueError(f"its header declares the sizes {', '.join(map(str, shape))}")
            values = stream.read(count + 1)
        if len(values) != count:
            raise ValueError(
                f"its header declares {count:,} bytes, it holds {'more' if len(values) > count else f'{len(values):,}'}"
            )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    return np.frombuffer(values, np.uint8).reshape(shape)
