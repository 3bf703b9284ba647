"""An index of shards that is well formed and says something else than the shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deit_kd.data import open_source
from deit_kd.data.sources.pack import pack
from deit_kd.errors import UserError

Columns = dict[str, Any]


@pytest.fixture(scope="module")
def packed(fashion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "shards"
    pack(fashion_folder, output, None, 50_000)
    return output


@pytest.fixture
def change(packed: Path, tmp_path: Path) -> Callable[[Callable[[Columns], Columns], bool], Path]:
    """Makes a copy of the shards whose index is another, without or with pack.json."""

    def changed(to: Callable[[Columns], Columns], keeps_note: bool = False) -> Path:
        folder = tmp_path / "shards"
        shutil.copytree(packed, folder)
        if not keeps_note:
            (folder / "pack.json").unlink()
        columns = to(dict(np.load(folder / "index_train.npz")))
        np.savez_compressed(folder / "index_train.npz", **columns)
        return folder

    return changed


def within_first(columns: Columns, **values: Any) -> Columns:
    return {**columns, **{name: value(columns[name]) for name, value in values.items()}}


@pytest.mark.parametrize(
    "to",
    [
        lambda index: within_first(index, offset=lambda offset: np.full_like(offset, 512)),
        lambda index: within_first(index, offset=lambda offset: offset + 1),
        lambda index: within_first(index, size=np.ones_like),
        lambda index: {name: column[::2] for name, column in index.items()},
        lambda index: {name: column[1:] for name, column in index.items()},
        lambda index: {name: column[:-1] for name, column in index.items()},
        lambda index: {name: column[::-1] for name, column in index.items()},
    ],
)
def test_spans_are_those_of_the_shards(to: Callable[[Columns], Columns], change: Callable[..., Path]) -> None:
    folder = change(to)
    with pytest.raises(UserError, match=r"index_train.npz: is damaged \(its? .*\); remove it, and the shards are read through"):
        open_source("shards", folder, "train")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (lambda index: within_first(index, labels=lambda labels: labels.max() - labels), "the index says class"),
        (lambda index: within_first(index, keys=lambda keys: keys[::-1]), "another file lies in the shard"),
        (lambda index: within_first(index, size=lambda size: size - (np.arange(len(size)) == 0)), "another file lies in the shard"),
    ],
)
def test_an_image_is_what_the_index_names(
    to: Callable[[Columns], Columns], message: str, packed: Path, change: Callable[..., Path]
) -> None:
    right = open_source("shards", packed, "train")
    right.encoded(0)
    source = open_source("shards", change(to), "train")
    with pytest.raises(ValueError, match=message):
        source.encoded(0)


def test_files_are_those_that_were_packed(packed: Path, change: Callable[..., Path]) -> None:
    folder = change(lambda index: within_first(index, labels=lambda labels: labels.max() - labels), True)
    with pytest.raises(UserError, match=r"index_train.npz: was changed after deit-kd pack; pack again"):
        open_source("shards", folder, "train")
    shutil.copy(packed / "index_train.npz", folder)
    names = json.loads((packed / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps(names[::-1]))
    with pytest.raises(UserError, match=r"classes.json: was changed after deit-kd pack; pack again"):
        open_source("shards", folder, "train")
    (folder / "pack.json").unlink()
    open_source("shards", folder, "train").encoded(0)
