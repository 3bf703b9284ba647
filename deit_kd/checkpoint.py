"""What a run needs to go on: `checkpoints/step_XXXXXXXX/` of safetensors and one JSON, written whole or not at all.

A save goes to a temporary folder, is flushed to disk and renamed; only then are older ones pruned. A load takes the newest
folder whose files match the hashes in its `state.json`. No random state is stored: see `deit_kd.seed`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deit_kd import sharding
from deit_kd.errors import UserError
from deit_kd.files import Tensors, optional, sha256, whole_folder, write_tensors


def save(folder: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any], keep: int) -> Path:
    """Writes `folder/step_XXXXXXXX` with one safetensors file a part and state.json, then prunes to the newest `keep`.

    Raises:
        OSError: the disk is full or gone; what was there before is untouched.
    """
    final = folder / f"step_{step:08d}"
    with whole_folder(final) as temporary:
        hashes = {}
        for name, tensors in parts.items():
            file = temporary / f"{name}.safetensors"
            write_tensors(tensors, file)
            hashes[file.name] = sha256(file)
        content = {**state, "step": step, "sha256": hashes}
        (temporary / "state.json").write_text(json.dumps({**content, "own_sha256": _own_hash(content)}, indent=1))
    for old in [path for path in _all(folder) if path != final][: -keep + 1 or None]:
        with optional(f"removing {old}"):
            shutil.rmtree(old)
    return final


def set_aside_after(folder: Path, chosen: Path | None, warn: Callable[[str], None]) -> None:
    """Renames checkpoints of `folder` that are newer than the one to go on from: damaged, or of a course that is given up."""
    for path in _all(folder):
        if chosen is None or path.name > chosen.name:
            aside = path.with_name(f"aside_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warn(f"{path} is set aside as {aside.name}")


def newest(folder: Path, warn: Callable[[str], None], recipe: str | None = None) -> Path | None:
    """The newest checkpoint that is whole, and of the recipe with this fingerprint; others are named and passed over."""
    for path in reversed(_all(folder)):
        fault = _fault(path)
        if fault is None and recipe in (None, json.loads((path / "state.json").read_text()).get("recipe")):
            return path
        fault = fault or "is of another recipe"
        warn(f"{path}: {fault}; trying the one before it")
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(parts, state) of a checkpoint.

    Raises:
        UserError: it is missing or damaged.
    """
    fault = _fault(path)
    if fault is not None:
        raise UserError(f"{path}: {fault}; give another checkpoint to --resume, or auto for the newest whole one")
    state = json.loads((path / "state.json").read_text())
    return {Path(name).stem: load_file(path / name) for name in state["sha256"]}, state


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors `INDEX.NAME` and the rest as JSON."""
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
    """Puts back what `pack_optimizer` gave; of parameters that are cut over processes each its own part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    groups = [dict(group) for group in rest["param_groups"]]
    for key, value in {**rest["state"], **tensors}.items():
        index, _, name = key.removeprefix("group.").partition(".")
        if key.startswith("group."):
            groups[int(index)][name] = value
            continue
        whole = isinstance(value, Tensor)
        state.setdefault(int(index), {})[name] = sharding.cut_like(value, parameters[int(index)]) if whole else value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def _fault(path: Path) -> str | None:
    try:
        state = json.loads((path / "state.json").read_text())
        if state.pop("own_sha256") != _own_hash(state):
            return "state.json is damaged"
        hashes = state["sha256"]
        for name, expected in hashes.items():
            if sha256(path / name) != expected:
                return f"{name} is damaged"
    except OSError as error:
        return f"{Path(error.filename).name} is missing" if isinstance(error, FileNotFoundError) else "is no checkpoint folder"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json is damaged"
    return None


def _own_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
