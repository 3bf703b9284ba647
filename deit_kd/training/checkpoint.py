"""Checkpoints: folders `checkpoints/step_XXXXXXXX/` of safetensors and one JSON, written whole or not at all.

A save goes to a temporary folder, is flushed to disk and renamed; only then are older ones pruned. A load takes the newest
folder whose files match the hashes in its `state.json`. No random state is stored: see `deit_kd.seed`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deit_kd.distributed import fsdp
from deit_kd.errors import UserError
from deit_kd.files.atomic import Tensors, sha256, whole_folder, write_tensors
from deit_kd.files.documents import MEGABYTE, Document, check, read_json
from deit_kd.files.warn import optional

REMEDY = "give another checkpoint to --resume, or auto for the newest whole one"
CHANGING = ("lr", "step", "lookahead_step")  # what training changes in the groups of an optimizer
MOST_BYTES = 2000 * MEGABYTE  # of a state.json, which holds the lines of metrics.jsonl


class _DependsOn(Document):
    """What a run depends on, as far as code reads it; keys of a recipe may have any value."""

    classes: list[str] = []
    validation_classes: list[str] = []
    training_images: dict[str, int | str | None] = {}
    validation_images: dict[str, int | str | None] = {}
    teacher_tensors: list[str | None] = []
    starting_weights: str | None = None


class _Head(Document):
    """What every state.json has."""

    step: int = Field(ge=0, le=10**12)
    steps_per_epoch: int | None = Field(default=None, ge=1, le=10**12)
    sha256: dict[Annotated[str, Field(pattern=r"^\w{1,100}\.safetensors$")], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    own_sha256: str
    depends_on: _DependsOn = _DependsOn()
    folder: dict[str, str] = {}


def save(folder: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any], keep: int) -> Path:
    """Writes `folder/step_XXXXXXXX` with one safetensors file a part and state.json, then prunes to the newest `keep`.

    Raises:
        OSError: the disk is full or gone; what was there before is untouched.
        UserError: a folder of that name is there which is no checkpoint.
    """
    final = folder / f"step_{step:08d}"
    if final.exists() and not _is_ours(final):
        raise UserError(f"{final}: is in the way and is no checkpoint; move it away, and give the same command again")
    with whole_folder(final) as temporary:
        hashes = {}
        for name, tensors in parts.items():
            file = temporary / f"{name}.safetensors"
            write_tensors(tensors, file)
            hashes[file.name] = sha256(file)
        content = {**state, "step": step, "sha256": hashes}
        (temporary / "state.json").write_text(json.dumps({**content, "own_sha256": _own_hash(content)}, indent=1))
    prune(folder, final, keep)
    return final


def prune(folder: Path, last: Path, keep: int) -> None:
    """Removes all checkpoints of `folder` but the newest `keep`, of which `last`, which is whole, is one."""
    for old in [path for path in _all(folder) if path != last][: -keep + 1 or None]:
        with optional(f"removing {old}"):
            shutil.rmtree(old)


def set_aside_after(folder: Path, chosen: Path | None, warn: Callable[[str], None]) -> None:
    """Renames checkpoints of `folder` that are newer than the one to go on from: they are damaged, or of a continuation that is given up."""
    for path in _all(folder):
        if chosen is None or path.name > chosen.name:
            names = (f"aside_{path.name}{number and f'.{number}' or ''}" for number in count())
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            with optional(f"moving {path} aside", warn):
                path.rename(aside)
                warn(f"{path} is set aside as {aside.name}")


def newest(
    folder: Path,
    warn: Callable[[str], None],
    recipe: str | None = None,
    accepts: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Path | None:
    """The newest checkpoint that is whole, and of the recipe with this fingerprint; others are named and passed over.

    `accepts` decides by the state whether it is of the recipe, if the fingerprint alone does not.
    """
    for path in reversed(_all(folder)):
        try:
            state = verify(path)
        except UserError as error:
            warn(f"{str(error).removesuffix(f'; {REMEDY}')}; trying the one before it")
            continue
        if accepts(state) if accepts else recipe in (None, state.get("recipe")):
            return path
        warn(f"{path}: is of another recipe; trying the one before it")
    return None


def verify(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint, after all its files have been compared with their hashes.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: is no checkpoint folder; {REMEDY}")
    state = read_state(path)
    for name, expected in state["sha256"].items():
        try:
            damaged = not (path / name).is_file() or sha256(path / name) != expected
        except OSError as error:
            raise UserError(f"{path / name}: cannot be read ({error.strerror or error}); {REMEDY}") from None
        if damaged:
            raise UserError(f"{path}: {name} is {'damaged' if (path / name).exists() else 'missing'}; {REMEDY}")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint, as it was written.

    Raises:
        UserError: it is missing or damaged.
    """
    file = path / "state.json"
    state = read_json(file, dict[str, Any], REMEDY, MOST_BYTES)
    check(state, str(file), _Head, REMEDY)
    if state.pop("own_sha256") != _own_hash(state):
        raise UserError(f"{file}: is damaged; {REMEDY}")
    named = re.fullmatch(r"(?:aside_)?step_(\d{8,})(?:\.\d+)?", path.name)
    if named and int(named[1][:20]) != state["step"]:
        raise UserError(f"{file}: says step {state['step']} in a folder of another step; {REMEDY}")
    return state


def load(path: Path, verified: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(parts, state) of a checkpoint.

    Args:
        path: its folder.
        verified: this run has just compared the hashes of its files.

    Raises:
        UserError: it is missing or damaged.
    """
    state = read_state(path) if verified else verify(path)
    try:
        return {Path(name).stem: load_file(path / name) for name in state["sha256"]}, state
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); {REMEDY}") from None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors `INDEX.NAME` and the rest as JSON."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, values in content["state"].items():
        for name, value in values.items():
            target = tensors if isinstance(value, Tensor) else rest
            target[f"{index}.{name}"] = value
    groups = [dict(group) for group in content["param_groups"]]
    for number, group in enumerate(groups):
        for name in [name for name, value in group.items() if isinstance(value, Tensor)]:
            tensors[f"group.{number}.{name}"] = group.pop(name)  # LAMB keeps its step there
    return tensors, {"state": rest, "param_groups": groups}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, rest: Mapping[str, Any]) -> None:
    """Restores what `pack_optimizer` returned; of sharded parameters each process takes its part.

    Settings of the groups stay those with which the optimizer was built, but for those that training changes.

    Raises:
        ValueError: it is of another optimizer.
        KeyError: likewise.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    groups = [dict(group) for group in rest["param_groups"]]
    for key, value in {**rest["state"], **tensors}.items():
        if not re.fullmatch(r"(group\.)?\d{1,9}\.\w+", key):
            raise ValueError(f"optimizer: {key[:60]!r} is no entry of a parameter")
        index, _, name = key.removeprefix("group.").partition(".")
        if int(index) >= len(groups if key.startswith("group.") else parameters):
            raise ValueError(f"optimizer: {key} is an entry of a parameter that is not there")
        if key.startswith("group."):
            groups[int(index)][name] = value
            continue
        whole = isinstance(value, Tensor)
        state.setdefault(int(index), {})[name] = fsdp.shard_like(value, parameters[int(index)]) if whole else value
    built = optimizer.state_dict()["param_groups"]
    for group, own in zip(groups, built, strict=True):
        if group["params"] != own["params"]:
            raise ValueError("optimizer: a group is of other parameters")
        changed = {name: group[name] for name in CHANGING if name in group}
        for name, value in changed.items():
            if not _is_count_or_rate(value):
                raise ValueError(f"optimizer: {name} is {value!r:.60}")
        own.update(changed)
    optimizer.load_state_dict({"state": state, "param_groups": built})


def _is_count_or_rate(value: Any) -> bool:
    """Whether this is one finite number that is not negative."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and 0 <= value.item() < math.inf
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and _is_ours(path))


def _is_ours(path: Path) -> bool:
    """Whether a folder holds nothing but files of `save`, all or some."""
    return path.is_dir() and all(re.fullmatch(r"state\.json|\w+\.safetensors|\..*\.tmp", each.name) for each in path.iterdir())


def _own_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
