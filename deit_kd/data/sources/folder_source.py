"""Images in files, a folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from deit_kd.data.decode import FORMATS, decode_image, read_picture
from deit_kd.data.sources import folders
from deit_kd.errors import UserError
from deit_kd.files.warn import warn
from deit_kd.recipe import nearest
from deit_kd.text import for_terminal


class FileSource:
    """What sources of encoded images have in common: `encoded` and `labels` are theirs."""

    left_out, upright = "", False
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.encoded(index), self.upright), int(self.labels[index])

    def encoded(self, index: int) -> bytes:
        """The file of an image."""
        raise NotImplementedError


class FolderSource(FileSource):
    """ROOT/CLASS/*.EXT in a format of `decode.FORMATS`, subfolders included; see `folders` for what is left out.

    Args:
        root: the folder.
        class_names: in the order of labels; None: the folders, numbers by value, others by text.

    Raises:
        UserError: there are no classes, one has no picture or another name, or a folder cannot be read.
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None):
        shown = for_terminal(str(root))
        found, left_out = folders.class_folders(root)
        if not found:
            raise UserError(f"{shown}: has no class folders; expected {shown}/CLASS/IMAGE")
        names = {folder: folders.readable_name(folder) for folder in found}
        self.class_names = tuple(class_names or label_space(list(names.values())))
        label_of = {name: label for label, name in enumerate(self.class_names)}
        own = {folder: folders.same_name(name, label_of) for folder, name in names.items()}
        if unknown := [names[folder] for folder, name in own.items() if name is None]:
            near = nearest(unknown[0], label_of)
            raise UserError(f"{shown}: class {for_terminal(unknown[0])!r} is not among the training classes{near}")
        label = {folder: label_of[name] for folder, name in own.items() if name is not None}
        classes: dict[str, list[str]] = {}
        labels: list[int] = []
        for folder in tqdm(found, desc=f"reading {shown}", unit="class", delay=2, leave=False, disable=None):
            pictures = folders.find_pictures(os.path.join(root, folder))
            if not pictures.paths:
                others = f" of {', '.join(FORMATS)}, only {folders.in_words(pictures.left_out)}" if pictures.left_out else ""
                raise UserError(
                    f"{for_terminal(str(root / folder))}: the class has no image{others}; add some or remove the folder"
                )
            classes[folder] = pictures.paths
            labels += [label[folder]] * len(pictures.paths)
            left_out += pictures.left_out
        self.paths = [path for paths in classes.values() for path in paths]
        self.labels = np.asarray(labels)
        self.name, self.origin = f"images of {len(self.class_names)} classes in folders", shown
        self.left_out = folders.in_words(left_out)
        for remark in folders.remarks(root, classes):
            warn(f"{shown}: {remark}")
        if set(left_out) - {folders.HIDDEN}:
            warn(f"{shown}: left out are {self.left_out}")

    def where(self, index: int) -> str:  # noqa: D102
        return for_terminal(self.paths[index])

    def encoded(self, index: int) -> bytes:  # noqa: D102
        return read_picture(self.paths[index])


def label_space(names: Sequence[str]) -> Sequence[str]:
    """All 1000 ImageNet synsets when every folder is one, so that a part of ImageNet keeps ImageNet's labels; else the folders."""
    if all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names):
        from timm.data import ImageNetInfo

        synsets = ImageNetInfo("imagenet-1k").label_names()
        if set(names) <= set(synsets):
            return synsets
    return names
