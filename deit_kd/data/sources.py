"""Where images come from. A new source is one function here and one entry in `SOURCES`."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deit_kd.data.decode import Jpeg, as_jpeg, as_pixels, decode, decode_image
from deit_kd.errors import UserError
from deit_kd.recipe import nearest

Split = Literal["train", "val"]
EMBEDDED = Path(__file__).parent / "fashion_mnist" / "fashion_mnist_12k.npz"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Source(Protocol):
    """Images and labels of one split."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # [N] int
    name: str  # what this is, as a card may say it
    origin: str  # where it lies, for messages

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
    return as_pixels(source[index][0]) if content is None else decode(content)


def pixels_or_jpeg(source: Source, index: int) -> Tensor | Jpeg:
    """The file of an image that the device can decode; else its `pixels`."""
    content = source.encoded(index)
    return as_pixels(source[index][0]) if content is None else as_jpeg(content) or decode(content)


class ArraySource:
    """Images held in memory: uint8 [N,H,W] or [N,H,W,3]."""

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


class PartSource:
    """Some images of another source."""

    def __init__(self, whole: Source, indices: np.ndarray):
        self.whole, self.indices = whole, indices
        self.class_names, self.labels, self.name, self.origin = whole.class_names, whole.labels[indices], whole.name, whole.origin

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:  # noqa: D102
        return self.whole.where(int(self.indices[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[int(self.indices[index])]

    def encoded(self, index: int) -> bytes | None:  # noqa: D102
        return self.whole.encoded(int(self.indices[index]))


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(the rest, the held out): of each class the rounded share, but never all; drawn by the seed.

    Raises:
        UserError: nothing would be held out.
    """
    rng, held = np.random.default_rng(seed), []
    for label in np.unique(source.labels):
        own = rng.permutation(np.flatnonzero(source.labels == label))
        held += own[: min(round(share * len(own)), len(own) - 1)].tolist()
    if not held:
        raise UserError(f"{source.origin}: holding out {share:g} of each class is less than an image; raise finetune.holdout")
    chosen = np.zeros(len(source), dtype=bool)
    chosen[held] = True
    return PartSource(source, np.flatnonzero(~chosen)), PartSource(source, np.flatnonzero(chosen))


class FolderSource:
    """ROOT/CLASS/*.EXT in any format that PIL reads, subfolders included."""

    def __init__(self, root: Path, class_names: Sequence[str] | None = None):
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise UserError(f"{root}: has no class folders; expected {root}/CLASS/IMAGE")
        self.class_names = tuple(class_names or _label_space(folders))
        label_of = {name: label for label, name in enumerate(self.class_names)}
        if unknown := [name for name in folders if name not in label_of]:
            raise UserError(f"{root}: class {unknown[0]!r} is not among the training classes{nearest(unknown[0], label_of)}")
        extensions = readable()
        self.paths: list[str] = []
        labels: list[int] = []
        for name in tqdm(folders, desc=f"reading {root}", unit="class", delay=2, leave=False, disable=None):
            found = sorted(
                os.path.join(folder, file)
                for folder, _, files in os.walk(root / name, followlinks=True)
                for file in files
                if file.lower().endswith(extensions) and not file.startswith(".")
            )
            if not found:
                raise UserError(f"{root / name}: the class has no image; add some or remove the folder")
            self.paths += found
            labels += [label_of[name]] * len(found)
        self.labels = np.asarray(labels)
        self.name, self.origin = f"images of {len(self.class_names)} classes in folders", str(root)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:  # noqa: D102
        return self.paths[index]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.encoded(index)), int(self.labels[index])

    def encoded(self, index: int) -> bytes:  # noqa: D102
        return Path(self.paths[index]).read_bytes()


def readable() -> tuple[str, ...]:
    """Endings of files that Pillow can open as pictures: not those that it only writes, nor films and printed pages."""
    known = Image.registered_extensions()
    return tuple(
        end for end, kind in known.items() if kind in Image.OPEN and kind not in ("EPS", "MPEG", "WMF", "HDF5", "GRIB", "BUFR")
    )


def _label_space(folders: Sequence[str]) -> Sequence[str]:
    """All 1000 ImageNet synsets when every folder is one, so that a part of ImageNet keeps ImageNet's labels; else the folders."""
    if all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in folders):
        from timm.data import ImageNetInfo

        synsets = ImageNetInfo("imagenet-1k").label_names()
        if set(folders) <= set(synsets):
            return synsets
    return folders


def _image_folder(data: Path | None, split: Split) -> Source:
    if data is None:
        raise UserError("data.source=image_folder needs a folder: pass --data DIR with DIR/train/CLASS/ and DIR/val/CLASS/")
    _must_exist(data)
    train = data / "train"
    if not train.is_dir():
        raise UserError(f"{data}: has no train folder; expected {data}/train/CLASS/IMAGE and {data}/val/CLASS/IMAGE")
    if split == "train":
        return FolderSource(train)
    for name in ("val", "validation"):
        if (data / name).is_dir():
            folders = sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith("."))
            return FolderSource(data / name, _label_space(folders))
    raise UserError(f"{data}: has no val or validation folder; expected {data}/val/CLASS/IMAGE")


def open_folder_to_evaluate(data: Path) -> Source:
    """DIR/val/CLASS/, DIR/validation/CLASS/, or else DIR/CLASS/.

    Raises:
        UserError: there are none.
    """
    _must_exist(data)
    return FolderSource(next((data / name for name in ("val", "validation") if (data / name).is_dir()), data))


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
            images, labels = (_read_idx(next(path for path in found if path.name.startswith(file))) for file in files)
            return ArraySource(images, labels, FASHION_CLASSES, "Fashion-MNIST", f"Fashion-MNIST in {folder}")
    dataset = _download("FashionMNIST", data, f"{files[0]}[.gz] and {files[1]}[.gz]", train=split == "train")
    return ArraySource(dataset.data.numpy(), dataset.targets.numpy(), FASHION_CLASSES, "Fashion-MNIST", f"Fashion-MNIST in {data}")


def _read_idx(path: Path) -> np.ndarray:
    """Reads the IDX format of MNIST: two zero bytes, a type, the number of dimensions, their sizes, then bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the file again") from None


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


def _shards(data: Path | None, split: Split) -> Source:
    from deit_kd.data.shards import open_shards  # which packs folders, and so imports this file

    return open_shards(data, split)


def _hf_datasets(data: Path | None, split: Split) -> Source:
    from deit_kd.data.hf_datasets import open_rows

    return open_rows(data, split)


def _download(name: str, data: Path, files: str, **kwargs: Any) -> Any:
    """The torchvision dataset in `data`, downloaded when it is not there."""
    import torchvision.datasets

    try:
        return getattr(torchvision.datasets, name)(str(data), download=True, **kwargs)
    except (OSError, RuntimeError) as error:  # no network, an interrupted download, a wrong checksum
        raise UserError(
            f"--data {data}: does not hold {name}, and downloading it failed ({' '.join(str(error).split())}); put {files} there by hand"
        ) from None


SOURCES: dict[str, Callable[[Path | None, Split], Source]] = {
    "fashion_mnist": _fashion_mnist,
    "image_folder": _image_folder,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "imagenette": _imagenette,
    "shards": _shards,
    "hf_datasets": _hf_datasets,
}


def open_source(name: str, data: Path | None, split: Split) -> Source:
    """Opens a split of a named source; `data` is the folder that --data names.

    Raises:
        UserError: unknown source, or missing, unreadable or empty data.
    """
    if name not in SOURCES:
        raise UserError(f"data.source={name}: unknown{nearest(name, SOURCES)}; known: {', '.join(SOURCES)}")
    return SOURCES[name](data, split)
