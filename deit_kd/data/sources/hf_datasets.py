"""Images in whatever Hugging Face's `datasets` reads: Parquet files of a folder, a dataset of the hub, files behind URLs.

The library keeps what it read as Arrow files in its cache, from where rows are read by index: the stream is as that of a folder.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from deit_kd.data.decode import read_picture
from deit_kd.data.sources import folders
from deit_kd.data.sources.base import Source, Split
from deit_kd.data.sources.folder_source import FileSource
from deit_kd.errors import UserError
from deit_kd.files.warn import warn
from deit_kd.text import for_terminal

VALIDATION = ("validation", "val", "valid", "test")  # the first that is there
MOST_CLASSES = 1_000_000  # that labels without names may mean
LABELS = ("label", "labels", "fine_label", "cls")  # columns, where none is declared to hold classes


class RowSource(FileSource):
    """A table with a column of images and one of labels.

    Args:
        rows: of a split, a `datasets.Dataset`.
        class_names: of the labels.
        image: the column of encoded images.
        labels: [N] int.
        origin: where it is, for messages.
    """

    def __init__(self, rows: Any, class_names: tuple[str, ...], image: str, labels: np.ndarray, origin: str):
        self.rows, self.image, self.labels = rows, image, labels
        self.class_names, self.origin = class_names, origin
        self.name = f"{rows.info.dataset_name or 'a table'}, images of {len(class_names)} classes"

    def where(self, index: int) -> str:  # noqa: D102
        return f"row {index} of {self.origin}, split {self.rows.split}"

    def encoded(self, index: int) -> bytes:  # noqa: D102
        cell = self.rows[index][self.image]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row has no image")
        return read_picture(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def open_rows(data: Path | None, split: Split, label_column: str | None = None) -> Source:
    """The source `hf_datasets`: of --data DIR, ORG/NAME of the hub, or an address with {split} in it.

    Of a folder the files SPLIT.parquet, SPLIT-0000.parquet and SPLIT-00000-of-00002.parquet are read, others are counted.

    Args:
        data: where it is.
        split: train or val.
        label_column: of several that hold classes; None: the one that there is.

    Raises:
        UserError: the library is missing, or finds or knows nothing there.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("data.source=hf_datasets needs the package datasets: pip install datasets") from None
    if data is None:
        raise UserError(
            "data.source=hf_datasets needs --data: a folder of Parquet files, ORG/NAME of the hub, or URL/{split}.parquet"
        )
    origin = re.sub(r"^(\w+):/(?!/)", r"\1://", str(data))  # a Path has lost a slash of a URL
    try:
        tables, left_out = _load(datasets, origin)
    except Exception as error:  # the library, its file systems and readers raise each their own
        cause = error.__cause__ or error
        raise UserError(
            f"--data {origin}: datasets cannot read it ({' '.join(f'{type(cause).__name__}: {cause}'.split())[:300]})"
        ) from None
    validation = [name for name in VALIDATION if name in tables]
    if "train" not in tables or not validation:
        others = f" (left out: {folders.in_words(left_out)})" if left_out else ""
        raise UserError(
            f"--data {origin}: has the splits {', '.join(tables) or 'none'}{others}; needed are train and one of {', '.join(VALIDATION)}"
        )
    if validation[0] == "test":
        warn(
            f"{origin}: has no split {' or '.join(VALIDATION[:-1])}; its test images are taken for validation, so what is chosen by them "
            "(keep_best, settings) is chosen on test images"
        )
    if left_out:
        warn(f"{origin}: left out are {folders.in_words(left_out)}")
    left_out += Counter({f"images of {name}": len(rows) for name, rows in tables.items() if name not in ("train", validation[0])})
    chosen = {"train": tables["train"], "val": tables[validation[0]]}
    columns = {name: _columns(datasets, table.features, label_column, origin) for name, table in chosen.items()}
    if columns["train"] != columns["val"]:
        raise UserError(
            f"--data {origin}: training and validation data have other columns, or classes in another order; write them alike"
        )
    image, column, names = columns["train"]
    labels = {name: _labels(table.data.column(column), names, origin) for name, table in chosen.items()}
    names = names or tuple(map(str, range(min(MOST_CLASSES, max(int(each.max()) for each in labels.values())) + 1)))
    if len(names) > MOST_CLASSES:
        raise UserError(f"--data {origin}: labels go up to {len(names) - 1:,}; count them from 0 without gaps")
    rows = chosen[split].cast_column(image, datasets.Image(decode=False))
    source = RowSource(rows, _synsets(names), image, labels[split], origin)
    source.left_out = folders.in_words(left_out)
    return source


def _load(datasets: Any, origin: str) -> tuple[Any, Counter[str]]:
    """(tables by split, which other tables lie there). Files are read split by split, each with its own schema; else the first one's classes would be taken for all."""
    folder, left_out = Path(origin), Counter[str]()
    if "{split}" in origin:
        files = {name: [origin.replace("{split}", name)] for name in ("train", "val")}
    elif found := sorted(folder.glob("*.parquet")):
        own = {name: re.compile(rf"{name}([-_.]\d+(-of-\d+(-[0-9a-f]+)?)?)?\.parquet") for name in ("train", *VALIDATION)}
        files = {name: [str(file) for file in found if form.fullmatch(file.name)] for name, form in own.items()}
        read = {Path(file).name for each in files.values() for file in each}
        left_out += Counter(file.name for file in found if file.name not in read)
    else:
        return datasets.load_dataset(origin), left_out
    builder = "webdataset" if ".tar" in folder.suffixes else "parquet"
    tables = {name: datasets.load_dataset(builder, data_files={name: paths}, split=name) for name, paths in files.items() if paths}
    return tables, left_out


def _columns(datasets: Any, features: Any, chosen: str | None, origin: str) -> tuple[str, str, tuple[str, ...] | None]:
    """(column of images, column of labels, names of classes if they are declared)"""
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if classes:  # a column `label` of numbers beside them may be the labels as well
        numbers = [name for name in LABELS if "int" in str(getattr(features.get(name), "dtype", ""))]
        classes = [name for name in features if name in classes or name in numbers]
    classes = classes or [name for name in LABELS if name in features]
    there = for_terminal(", ".join(f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in features.items()))[
        :500
    ]
    if chosen is not None:
        if chosen not in features:
            raise UserError(f"--data {origin}: data.label_column={chosen}: no such column; there are {there}")
        classes = [chosen]
    if len(classes) > 1:
        names = for_terminal(" and ".join(classes))
        raise UserError(f"--data {origin}: has the labels {names}; choose with data.label_column={for_terminal(classes[0])}")
    if len(images) != 1 or len(classes) != 1:
        raise UserError(f"--data {origin}: needed is one column of images and one of labels; its columns are {there}")
    kind = features[classes[0]]
    return images[0], classes[0], tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None


def _labels(column: Any, names: tuple[str, ...] | None, origin: str) -> np.ndarray:
    """[N] int64."""
    if str(column.type).lstrip("u") not in ("int8", "int16", "int32", "int64"):
        raise UserError(f"--data {origin}: labels are {column.type}; needed are whole numbers, best a ClassLabel with names")
    if column.null_count or not len(column):
        raise UserError(f"--data {origin}: has rows without a label, or no rows")
    labels = np.asarray(column).astype(np.int64)
    if labels.min() < 0:
        raise UserError(f"--data {origin}: has rows without a label (below 0)")
    if names is not None and labels.max() >= len(names):
        raise UserError(
            f"--data {origin}: label {labels.max()} is none of the {len(names)} classes that are declared; write it anew"
        )
    if names is None and labels.min() > 0:
        raise UserError(
            f"--data {origin}: labels begin with {labels.min()} instead of 0; count them from 0, or declare a ClassLabel"
        )
    return labels


def _synsets(names: tuple[str, ...]) -> tuple[str, ...]:
    """ImageNet's 1000 synsets where classes have its descriptions (tench, Tinca tinca), else the names: as folders have them."""
    if len(names) == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        if [name.split(",")[0] for name in names] == [text.split(",")[0] for text in info.label_descriptions()]:
            return tuple(info.label_names())
    return names
