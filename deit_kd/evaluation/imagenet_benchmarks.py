"""Benchmarks of ImageNet classifiers, as their authors lay them out: ImageNet-V2, ReaL, -A, -R, -Sketch, -C."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.data import ImageNetInfo

from deit_kd.data.sources.base import Source
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.errors import UserError
from deit_kd.recipe import nearest


class Examination(NamedTuple):
    """Images, and what counts as a right answer."""

    source: Source  # labels are ImageNet's 1000, in the order of their synsets; of ReaL the number of the image
    among: np.ndarray | None = None  # the classes that may be answered; None: all
    accepted: np.ndarray | None = None  # [labels, 1000] bool: right answers of each label; None: the label itself


def _synsets() -> list[str]:
    return list(ImageNetInfo("imagenet-1k").label_names())


def _folders(root: Path) -> FolderSource:
    return FolderSource(root, _synsets())


def _v2(root: Path) -> dict[str, Examination]:
    """Folders 0 to 999, by the number of the class."""
    source = FolderSource(root, [str(number) for number in range(1000)])
    source.class_names = tuple(_synsets())
    return {"": Examination(source)}


def _subset(letter: str) -> Callable[[Path], dict[str, Examination]]:
    """ImageNet-A and -R: 200 of the classes, and answers among these."""

    def read(root: Path) -> dict[str, Examination]:
        listed = pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_indices.txt")
        assert listed is not None, "timm ships it"
        among = np.array([int(line) for line in listed.decode().split()])
        source = _folders(root)
        if foreign := set(source.labels.tolist()) - set(among.tolist()):
            raise UserError(f"{root}: {_synsets()[min(foreign)]} is none of the 200 classes of ImageNet-{letter.upper()}")
        return {"": Examination(source, among)}

    return read


def _real(root: Path) -> dict[str, Examination]:
    """ImageNet's validation images, with every label that ReaL's annotators agree on; images without one do not count."""
    listed = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert listed is not None, "timm ships it"
    labels: list[list[int]] = json.loads(listed)
    source = _folders(root)
    numbers = [re.fullmatch(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.\w+", Path(path).name) for path in source.paths]
    if None in numbers:
        raise UserError(
            f"{source.where(numbers.index(None))}: ReaL's labels go by the names of ImageNet's validation images, ILSVRC2012_val_00000001.JPEG"
        )
    images = [int(number[1]) - 1 for number in numbers if number]
    if strange := [place for place, image in enumerate(images) if not 0 <= image < len(labels)]:
        raise UserError(f"{source.where(strange[0])}: ReaL has labels of the images 1 to {len(labels):,} alone; remove it")
    counted = [place for place, image in enumerate(images) if labels[image]]
    source.paths = [source.paths[place] for place in counted]
    source.labels = np.arange(len(counted))
    accepted = np.zeros((len(counted), 1000), dtype=bool)
    for row, place in enumerate(counted):
        accepted[row, labels[images[place]]] = True
    return {"": Examination(source, accepted=accepted)}


def _c(root: Path) -> dict[str, Examination]:
    """CORRUPTION/SEVERITY/CLASS/."""
    found = sorted(path for path in root.glob("*/[1-5]") if path.is_dir())
    if not found:
        raise UserError(f"{root}: has no CORRUPTION/SEVERITY folders, such as gaussian_noise/1/n01440764")
    return {f"{path.parent.name}/{path.name}": Examination(_folders(path)) for path in found}


BENCHMARKS: dict[str, Callable[[Path], dict[str, Examination]]] = {
    "imagenet": lambda root: {"": Examination(_folders(root))},
    "imagenet-v2": _v2,
    "imagenet-real": _real,
    "imagenet-a": _subset("a"),
    "imagenet-r": _subset("r"),
    "imagenet-sketch": lambda root: {"": Examination(_folders(root))},
    "imagenet-c": _c,
}


def open_benchmark(name: str, data: Path | None) -> dict[str, Examination]:
    """The parts of a benchmark by name: one part named ""; of ImageNet-C one for each corruption and severity.

    Raises:
        UserError: an unknown benchmark, or data that are not laid out as its authors do.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark {name}: unknown{nearest(name, BENCHMARKS)}; known: {', '.join(BENCHMARKS)}")
    if data is None or not data.is_dir():
        raise UserError(f"--benchmark {name} needs --data DIR" + (f"; {data} is no directory" if data else ""))
    return BENCHMARKS[name](data / "val" if (data / "val").is_dir() else data)
