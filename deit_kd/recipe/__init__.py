"""A recipe: one complete YAML document that says what is trained. Reading one imports no torch.

`load` finds the file, applies `key=value` overrides, and refuses with every fault at once. Machine facts (data folder, output folder,
device batch) are flags of train.py, not keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from deit_kd.errors import UserError
from deit_kd.files.documents import read_json, short, what_is_wrong
from deit_kd.files.imports import imported
from deit_kd.files.warn import warn
from deit_kd.recipe import renamed
from deit_kd.recipe.checks import SELECTORS, beyond_a_cache, impossible, keys_read
from deit_kd.recipe.document import FLOAT, Kind, RecipeError, hints, kind_of, read_override, read_yaml
from deit_kd.recipe.library import FOLDER, File, find, listing, names, nearest, overview, run_folder, take_variants
from deit_kd.recipe.partial import well_typed
from deit_kd.recipe.schema import (
    Augmentation,
    Data,
    Distill,
    Distillation,
    Evaluation,
    Finetune,
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
from deit_kd.text import printable

__all__ = [
    "FOLDER",
    "Augmentation",
    "Data",
    "Distill",
    "Evaluation",
    "Finetune",
    "Distillation",
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
    "find",
    "flatten",
    "keys_read",
    "listing",
    "load",
    "names",
    "nearest",
    "overview",
    "run_folder",
]

MOST_FAULTS = 20  # in one message
# What other tools call a key; the nearest spelling would be another one.
MEANT = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "wd": "optim.weight_decay",
    "batch_size": "global_batch_size",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "sched": "optim.schedule",
    "warmup": "optim.warmup_epochs",
    "smoothing": "augmentation.label_smoothing",
    "tau": "distill.temperature",
    "drop_path_rate": "student.drop_path",
    "amp": "run.precision",
    "mixed_precision": "run.precision",
    "num_workers": "run.workers",
    "normalization": "distill.normalization",
}

_ADAPTER = TypeAdapter(Recipe)
_KIND = kind_of(File)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `load` would take for a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe.

    Args:
        name_or_path: a name in `recipes/`, the path of a YAML file, or a run folder; each may end in `:VARIANT`.
        overrides: `key=value` strings, keys dotted (`optim.lr=1e-3`), values as the key's type asks. One that chooses something (a loss, a
            projector, an optimizer, a schedule) drops the keys that only the choice before read. They come after the keys of a variant.

    Raises:
        RecipeError: unknown recipe or variant, or every fault in it, each with key, value and remedy.
    """
    path, variant = find(name_or_path)
    document = read_yaml(path, _KIND)
    if not isinstance(document, dict):
        raise RecipeError(f"{printable(str(path))}: a recipe is a mapping of sections; copy one of recipes/ to start")
    differing = take_variants(document, variant, path)
    if said := renamed.update(document):
        warn(f"{printable(str(path))}: {'; '.join(said)}")
    faults = [f"variants.{variant}: {fault}" for override in differing if (fault := _apply(document, override, differing))]
    faults += [fault for override in overrides if (fault := _apply(document, override, overrides))]
    try:
        recipe = _ADAPTER.validate_python(document)
        faults += impossible(recipe)
    except ValidationError as error:
        details = error.errors(include_url=False)
        faults += _merged([_explain(detail) for detail in details[: 3 * MOST_FAULTS]])  # several details may be of one key
        faults += impossible(well_typed(Recipe, document))
    if faults and (needed := _imports_of(path.parent) - set(imported())):
        faults.append(f"the run used {', '.join(sorted(needed))}; give --import with its path")
    if faults:
        faults = list(dict.fromkeys(map(printable, faults)))
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        more = ["and more"] if len(faults) > MOST_FAULTS else []
        count = f"more than {MOST_FAULTS} faults" if more else count
        raise RecipeError("\n  ".join([f"recipe {printable(path.name)}: {count}", *faults[:MOST_FAULTS], *more]))
    return recipe


def _imports_of(folder: Path) -> set[str]:
    """The names of the Python files that a run imported, by its run.json; empty if there is none."""
    with suppress(UserError):
        return set(read_json(folder / "run.json", dict[str, Any], "").get("imports") or {})
    return set()


def dump(recipe: Recipe, change: Callable[[Any], Any] = lambda document: document) -> str:
    """The resolved, complete recipe as YAML; `load` reads it back to an equal one, but for what `change` does to its values."""
    return yaml.dump(change(_ADAPTER.dump_python(recipe, mode="json")), Dumper=_Dumper, sort_keys=False)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for each key that differs and moves a number (the section `run` does not)."""
    a, b = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in {**a, **b} if not key.startswith("run.")]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def fingerprint(recipe: Recipe) -> str:
    """The same for recipes without `differences`; a key at its default counts like one that a recipe of an earlier version lacks."""
    moving = [
        (name, repr(first))
        for key, value in flatten(recipe)
        for name, first in [renamed.first_names(key, value)]
        if not key.startswith("run.") and value is not None and (isinstance(value, dict) or value != _DEFAULTS.get(key))
        if value or not key.endswith(".parameters")  # which earlier versions lack
    ]
    return hashlib.sha256(repr(sorted(moving)).encode()).hexdigest()


def _keys(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Kind]]:
    """Every dotted key with its field and what it takes; those of `teachers` with a star for the entry's number."""
    for f in dataclasses.fields(cls):
        kind = kind_of(hints(cls)[f.name])
        yield prefix + f.name, f, kind
        if f.name == "teachers":
            yield from _keys(OneOfTeachers, "teachers.*.")
        elif kind.section is not None:
            yield from _keys(kind.section, f"{prefix}{f.name}.")


_KINDS = {key: kind for key, _, kind in _keys()}
_DEFAULTS = {key: f.default for key, f, _ in _keys() if f.default is not dataclasses.MISSING}


def _unknown(key: str) -> str:
    meant = MEANT.get(key.rpartition(".")[2].lower())
    return f" (did you mean {meant}?)" if meant else nearest(key[:100], _KINDS)


def _kind(key: str) -> Kind | None:
    """What a dotted key takes; None: it is unknown."""
    starred = re.sub(r"^teachers\.\d{1,3}\.", "teachers.*.", key, flags=re.ASCII)
    owner, _, last = starred.rpartition(".")
    if _KINDS.get(owner) and _KINDS[owner].values is not None and re.fullmatch(r"\w+", last):  # their keys are values
        return _KINDS[owner].child(last)
    return _KINDS.get(starred)


def _apply(document: dict[str, Any], override: str, overrides: Sequence[str]) -> str | None:
    """Sets one `key=value` in the document; returns the fault, if any."""
    key, equals, text = override.partition("=")
    if not equals:
        return f"{short(override)} is not an override; write key=value, for example optim.lr=1e-3"
    if (now := renamed.current_key(key)) != key:
        warn(f"{key} {'is no longer a key' if now is None else f'is now {now}'}")
        if now is None:
            return None
        key = now
    kind = _kind(key)
    if kind is None:
        return f"{key[:100]}: unknown key in an override{_unknown(key)}"
    *parents, last = key.split(".")
    section: Any = document
    for parent in parents:
        if isinstance(section, list):
            section = section[int(parent)] if int(parent) < len(section) else None
        else:  # only these may be missing from a file
            section = (
                section.setdefault(parent, {})
                if parent in ("run", "ramp_epochs", "active_epochs", "parameters")
                else section.get(parent)
            )
        if not isinstance(section, (dict, list)):
            missing = f"there is no teachers.{parent}" if parent.isdigit() else f"{parent} is null"
            return f"{key}: cannot be set, because {missing} in this recipe"
    try:
        value = read_override(text, kind)
    except ValueError as error:
        return f"{key}: {error}"
    value = renamed.current_value(key, value)
    assert isinstance(section, dict)
    selector = ".".join([*parents, last][-2:])
    if selector in SELECTORS:
        stated = {other.partition("=")[0].rpartition(".")[2] for other in overrides if other.startswith(".".join([*parents, ""]))}
        for stale in set(_reads(selector, section.get(last))) - set(_reads(selector, value)) - stated:
            section.pop(stale, None)
    section[last] = value
    return None


def _reads(selector: str, choice: Any) -> tuple[str, ...]:
    """The keys that a choice reads, see `keys_read`."""
    other = ("betas", "eps") if selector == "optim.name" else ()
    return keys_read(selector).get(choice, other) if isinstance(choice, str) else ()


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
    parts = [str(part)[:100] for part in detail["loc"]]
    places = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    key = max((place for place in places if _kind(place) or re.fullmatch(r"teachers\.\d+", place)), key=len, default=parts[0])
    value, kind = short(detail["input"]), detail["type"]
    if kind == "unexpected_keyword_argument":
        return f"{places[-1]}: unknown key{_unknown(places[-1])}"
    if kind in ("missing", "missing_argument"):
        return f"{places[-1]}: missing; a recipe states every key that moves a number"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return f"{key}: must be a section (a mapping of keys), got {value}"
    return f"{key}: {what_is_wrong(detail)}, got {value}"
