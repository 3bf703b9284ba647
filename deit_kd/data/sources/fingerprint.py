"""Fingerprints of data, which do not depend on the place of their files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from deit_kd.data.sources.base import Source, Subset
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.data.sources.shards import ShardSource


def fingerprint(source: Source) -> str:
    """The number of images, and a hash of all labels and of 512 images spread over all; it takes seconds."""
    digest = hashlib.sha256(source.labels.astype("<i8").tobytes())
    some = np.random.default_rng(0).permutation(len(source))[:512]
    for index in some.tolist():
        try:
            image, label = source[index]
        except Exception:  # an unreadable image, which the loader will name or skip
            continue
        digest.update(f"{label} {image.size} ".encode() + image.tobytes())
    return f"{len(source)} {digest.hexdigest()}"


def of_images(source: Source) -> dict[str, Any]:
    """The facts that differ between data sets: number, classes, labels, sizes of files, and a hash of some images."""
    of_files = sizes(source)
    return {
        "number of images": len(source),
        "classes": list(source.class_names),
        "hash of labels and of 512 images": fingerprint(source).partition(" ")[2],
        "hash of the sizes of files": None if of_files is None else hashlib.sha256(of_files.astype("<i8").tobytes()).hexdigest(),
    }


def sizes(source: Source) -> np.ndarray | None:
    """[N] bytes of each image's file, which a folder and shards that were packed of it have in common; None of data without files."""
    if isinstance(source, Subset):
        whole = sizes(source.whole)
        return None if whole is None else whole[source.indices]
    if isinstance(source, FolderSource):
        return np.asarray([Path(path).stat().st_size for path in source.paths])
    return source.size if isinstance(source, ShardSource) else None
