"""A recipe: one complete YAML document that says what is trained. Reading one imports no torch.

`load` finds the file, applies `key=value` overrides, and refuses with every fault at once. Machine facts (data folder, output folder,
device batch) are flags of train.py, not keys.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from deit_kd.errors import UserError
from deit_kd.recipe import schema
from deit_kd.recipe.checks import READS, beyond_a_cache, impossible
from deit_kd.recipe.schema import (
    Augmentation,
    Data,
    Distill,
    Evaluation,
    Finetune,
    Lesson,
    OneOfTeachers,
    Optim,
    Projector,
    Recipe,
    Run,
    Section,
    Student,
    Teacher,
    flatten,
)

__all__ = [
    "READS",
    "Augmentation",
    "Data",
    "Distill",
    "Evaluation",
    "Finetune",
    "Lesson",
    "OneOfTeachers",
    "Optim",
    "Projector",
    "Recipe",
    "Run",
    "Section",
    "Student",
    "Teacher",
    "RecipeError",
    "beyond_a_cache",
    "differences",
    "fingerprint",
    "dump",
    "flatten",
    "load",
    "names",
    "nearest",
]

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"


class RecipeError(UserError):
    """Every fault of a recipe, one a line."""


_ADAPTER = TypeAdapter(Recipe)


def names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        name_or_path: a name in `recipes/`, or the path of a YAML file.
        overrides: `key=value` strings, keys dotted (`optim.lr=1e-3`), values YAML.

    Raises:
        RecipeError: unknown recipe, or every fault in it, each with key, value and remedy.
    """
    path = _find(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections; copy one of {', '.join(names())} to start")
    faults = [fault for override in overrides if (fault := _apply(document, override))]
    try:
        recipe = _ADAPTER.validate_python(document)
        faults += impossible(recipe)
    except ValidationError as error:
        faults += _merged([_explain(detail) for detail in error.errors()])
        faults += _impossible_beside(document, error)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise RecipeError("\n  ".join([f"recipe {path.name}: {count}", *dict.fromkeys(faults)]))
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved, complete recipe as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(_ADAPTER.dump_python(recipe, mode="json"), sort_keys=False)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for each key that differs and moves a number (the section `run` does not)."""
    a, b = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in {**a, **b} if not key.startswith("run.")]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def fingerprint(recipe: Recipe) -> str:
    """The same for recipes without `differences`; a key that is null counts like one that a recipe of an earlier version lacks."""
    moving = [(key, repr(value)) for key, value in flatten(recipe) if not key.startswith("run.") and value is not None]
    return hashlib.sha256(repr(sorted(moving)).encode()).hexdigest()


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError(f"recipe file {path} does not exist")
    if (FOLDER / f"{path}.yaml").is_file():
        return FOLDER / f"{path}.yaml"
    hint = nearest(str(path), names()) or f"; known: {', '.join(names())}"
    raise RecipeError(f"unknown recipe {str(path)!r}{hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing when no known word is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    # A key is often right but in the wrong section: compare the last part too.
    close = close or [k for k in known if "." in k and k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _known_keys(cls: type = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key; those of `teachers` with a star for the entry's number."""
    keys = []
    for f in dataclasses.fields(cls):
        if f.name == "teachers":
            keys += ["teachers", *_known_keys(OneOfTeachers, "teachers.*.")]
            continue
        section = getattr(schema, re.sub(r" \| None$", "", str(f.type)), None)
        is_section = isinstance(section, type) and issubclass(section, Section)
        keys += [prefix + f.name] + (_known_keys(section, f"{prefix}{f.name}.") if is_section else [])  # type: ignore[arg-type]
    return keys


def _apply(document: dict[str, Any], override: str) -> str | None:
    """Sets one `key=value` in the document; returns the fault, if any."""
    key, equals, text = override.partition("=")
    if not equals:
        return f"{override!r} is not an override; write key=value, for example optim.lr=1e-3"
    starred = re.sub(r"^teachers\.\d+\.", "teachers.*.", key)
    free = re.search(r"(^student\.model_args|distill\.ramp_epochs|distill\.active_epochs)\.\w+$", key)  # their keys are values
    if starred not in _known_keys() and not free:
        return f"{key}: unknown key in an override{nearest(key, _known_keys())}"
    *parents, last = key.split(".")
    section: Any = document
    for parent in parents:
        if isinstance(section, list):
            section = section[int(parent)] if int(parent) < len(section) else None
        else:  # only these may be missing from a file
            section = section.setdefault(parent, {}) if parent in ("run", "ramp_epochs", "active_epochs") else section.get(parent)
        if not isinstance(section, (dict, list)):
            return f"{key}: cannot be set, because {parent} is null in this recipe"
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"{key}: {text!r} is not a YAML value"
    return None


def _impossible_beside(document: dict[str, Any], error: ValidationError) -> list[str]:
    """Impossible values among the well-typed keys of a document that has faults of type too, so that all are told at once.

    Each faulty key takes the value that the quick start has; faults that name such a key are left out.
    """
    mended, good = copy.deepcopy(document), yaml.safe_load((FOLDER / "quickstart.yaml").read_text(encoding="utf-8"))
    places = {tuple(map(str, detail["loc"][:2])) for detail in error.errors()}
    for section, *key in places:
        if not key:
            mended[section] = good.get(section)
        elif isinstance(mended.get(section), dict) and isinstance(good.get(section), dict):
            mended[section][key[0]] = good[section].get(key[0])
            if key[0] not in good[section]:
                del mended[section][key[0]]
    mended = {key: value for key, value in mended.items() if key in good}
    try:
        faults = impossible(_ADAPTER.validate_python(mended))
    except ValidationError:
        return []
    names = [".".join(place) for place in places]
    return [fault for fault in faults if not any(name in fault for name in names)]


def _merged(faults: list[str]) -> list[str]:
    """A key that may be of several types has a fault for each of them: one."""
    merged: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        key, _, rest = fault.partition(": must be ")
        wanted, _, got = rest.rpartition(", got ")
        merged.setdefault((key, got) if wanted else (fault, ""), []).append(wanted)
    return [f"{key}: must be {' or '.join(wanted)}, got {got}" if wanted[0] else key for (key, got), wanted in merged.items()]


def _explain(detail: Any) -> str:
    """One pydantic error as `key: what is wrong (value, remedy)`."""
    known = _known_keys()
    parts = [str(part) for part in detail["loc"]]
    key = max((".".join(parts[:n]) for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in known), key=len, default="")
    value, kind = detail["input"], detail["type"]
    if kind == "unexpected_keyword_argument":
        key = ".".join(parts)
        return f"{key}: unknown key{nearest(key, known)}"
    if kind in ("missing", "missing_argument"):
        return f"{'.'.join(parts)}: missing; a recipe states every key that moves a number"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return f"{key}: must be a section (a mapping of keys), got {value!r}"
    message = detail["msg"].removeprefix("Input should be ")
    message = message.replace("a valid boolean, unable to interpret input", "true or false")
    message = message.replace("a valid integer, unable to parse string as an integer", "an integer")
    message = message.replace("a valid number, unable to parse string as a number", "a number")
    return f"{key}: must be {message}, got {value!r}"
