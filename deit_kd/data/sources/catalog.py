"""Where images come from. A new source is one function here and one entry in `SOURCES`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deit_kd.data.decode import SUFFIXES
from deit_kd.data.sources import folders
from deit_kd.data.sources.base import ArraySource, Source, Split
from deit_kd.data.sources.folder_source import FolderSource, label_space
from deit_kd.data.sources.hf_datasets import open_rows
from deit_kd.data.sources.idx import read_idx
from deit_kd.data.sources.shards import open_shards
from deit_kd.errors import UserError
from deit_kd.recipe import nearest

EMBEDDED = Path(__file__).resolve().parent.parent / "fashion_mnist" / "fashion_mnist_12k.npz"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def _image_folder(data: Path | None, split: Split) -> Source:
    if data is None:
        raise UserError("data.source=image_folder needs a folder: pass --data DIR with DIR/train/CLASS/ and DIR/val/CLASS/")
    _must_exist(data)
    train = data / "train"
    if not train.is_dir():
        raise UserError(f"{data}: has no train folder; expected {data}/train/CLASS/IMAGE and {data}/val/CLASS/IMAGE")
    order = data / folders.CLASS_ORDER
    stated = folders.read_class_names(order) if order.exists() else None
    if split == "train":
        return FolderSource(train, stated)
    for name in ("val", "validation"):
        if (data / name).is_dir():
            names = stated or label_space([folders.readable_name(folder) for folder in folders.class_folders(train)[0]])
            source = FolderSource(data / name, names)
            beside = [f"the folder {other}" for other in ("validation", "test") if other != name and (data / other).is_dir()]
            source.left_out = ", ".join([source.left_out, *beside] if source.left_out else beside)
            return source
    raise UserError(f"{data}: has no val or validation folder; expected {data}/val/CLASS/IMAGE")


def open_folder_to_evaluate(data: Path) -> Source:
    """DIR/val/CLASS/, DIR/validation/CLASS/, or else DIR/CLASS/.

    Raises:
        UserError: there are none.
    """
    _must_exist(data)
    own = next((data / name for name in ("val", "validation") if (data / name).is_dir()), data)
    if own == data and (data / "train").is_dir():
        raise UserError(
            f"{data}: has no val or validation folder beside train; expected {data}/val/CLASS/IMAGE or {data}/CLASS/IMAGE"
        )
    order = data / folders.CLASS_ORDER
    return FolderSource(own, folders.read_class_names(order) if order.exists() else None)


def _must_exist(data: Path) -> None:
    if not data.is_dir():
        raise UserError(f"--data {data}: no such directory")


def _fashion_mnist(data: Path | None, split: Split) -> Source:
    if data is None:
        with np.load(EMBEDDED, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        name = "Fashion-MNIST, the embedded 12,000 + 2,000 images"
        return ArraySource(images, labels, FASHION_CLASSES, name, name)
    _must_exist(data)
    prefix = {"train": "train", "val": "t10k"}[split]
    files = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    for folder in (data, data / "FashionMNIST" / "raw"):
        found = [path for file in files for path in (folder / file, folder / f"{file}.gz") if path.is_file()]
        if len({path.name.removesuffix(".gz") for path in found}) == 2:
            first, second = (next(path for path in found if path.name.startswith(file)) for file in files)
            arrays = read_idx(first, second, len(FASHION_CLASSES))
            return ArraySource(*arrays, FASHION_CLASSES, "Fashion-MNIST", f"Fashion-MNIST in {folder}")
    if (data / "train").is_dir():
        raise UserError(
            f"--data {data}: holds a train folder, and no Fashion-MNIST; to train on its images add data.source=image_folder"
        )
    dataset = _download("FashionMNIST", data, f"{files[0]}[.gz] and {files[1]}[.gz]", train=split == "train")
    return ArraySource(dataset.data.numpy(), dataset.targets.numpy(), FASHION_CLASSES, "Fashion-MNIST", f"Fashion-MNIST in {data}")


def _cifar(name: str) -> Callable[[Path | None, Split], Source]:
    def read(data: Path | None, split: Split) -> Source:
        if data is None:
            raise UserError(f"data.source={name.lower()} needs a folder: pass --data DIR, it is downloaded there once")
        _must_exist(data)
        dataset = _download(name, data, "the extracted cifar-* folder", train=split == "train")
        return ArraySource(dataset.data, np.asarray(dataset.targets), dataset.classes, name, f"{name} in {data}")

    return read


def _imagenette(data: Path | None, split: Split) -> Source:
    if data is None:
        raise UserError("data.source=imagenette needs a folder: pass --data DIR, it is downloaded there once")
    _must_exist(data)
    folder = data / "imagenette2-320"
    if not folder.is_dir():
        _download("Imagenette", data, "the extracted folder imagenette2-320", split="train", size="320px")
    return _image_folder(folder, split)


def _download(name: str, data: Path, files: str, **kwargs: Any) -> Any:
    """The torchvision dataset in `data`, downloaded when it is not there; a download that fails leaves nothing behind.

    Raises:
        UserError: `data` is an image folder, or the download failed.
    """
    if any((data / split).is_dir() for split in ("train", "val", "validation")):
        raise UserError(
            f"--data {data}: does not hold {name}, but looks like an image folder: set data.source=image_folder (and "
            "data.num_classes=auto data.train_images=auto, if it has others)"
        )
    if any(path.suffix.lower() in SUFFIXES for folder in data.iterdir() if folder.is_dir() for path in folder.iterdir()):
        raise UserError(
            f"--data {data}: does not hold {name}, but looks like folders of classes: put them into {data}/train/CLASS/ and "
            f"{data}/val/CLASS/, and set data.source=image_folder"
        )
    import torchvision.datasets

    before = set(data.iterdir())
    try:
        return getattr(torchvision.datasets, name)(str(data), download=True, **kwargs)
    except (OSError, RuntimeError) as error:  # no network, an interrupted download, a wrong checksum
        for path in set(data.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise UserError(
            f"--data {data}: does not hold {name}, and downloading it failed ({' '.join(str(error).split())}); put {files} there by hand"
        ) from None


SOURCES: dict[str, Callable[..., Source]] = {
    "fashion_mnist": _fashion_mnist,
    "image_folder": _image_folder,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "imagenette": _imagenette,
    "shards": open_shards,
    "hf_datasets": open_rows,
}
WITH_COLUMNS = ("shards", "hf_datasets")  # whose images may have several labels each


def open_source(name: str, data: Path | None, split: Split, *, upright: bool = False, label_column: str | None = None) -> Source:
    """Opens a split of a named source.

    Args:
        name: a key of `SOURCES`.
        data: the folder that --data names.
        split: train or val.
        upright: whether images are turned as their EXIF orientation says.
        label_column: of a table the column of labels, of shards the key of KEY.json; None: the one that there is.

    Raises:
        UserError: unknown source, or missing, unreadable or empty data.
    """
    if name not in SOURCES:
        raise UserError(f"data.source={name}: unknown{nearest(name, SOURCES)}; known: {', '.join(SOURCES)}")
    if label_column is not None and name not in WITH_COLUMNS:
        raise UserError(
            f"data.label_column={label_column}: {name} has no columns, only {' and '.join(WITH_COLUMNS)}; set it to null"
        )
    source = SOURCES[name](data, split, **({"label_column": label_column} if name in WITH_COLUMNS else {}))
    source.upright = upright
    return source
