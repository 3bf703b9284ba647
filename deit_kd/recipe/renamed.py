"""Keys and values that earlier versions called otherwise: recipes, overrides and checkpoints of then are still read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KEYS = {  # dotted key, without the teacher's number -> its last part now; None: nothing reads it any more
    "distill.normalisation": "normalization",
    "optim.decay": "weight_decay_on",
    "run.overlap_teacher": None,
}
VALUES = {"distill.kd_loss": {"normalised_distillation": "normalized_distillation"}}


def current_key(key: str) -> str | None:
    """A dotted key under its name of today; None if it was removed."""
    without_number = re.sub(r"^teachers\.\d{1,3}\.", "", key)
    if without_number not in KEYS:
        return key
    last = KEYS[without_number]
    return None if last is None else f"{key.rpartition('.')[0]}.{last}"


def current_value(key: str, value: Any) -> Any:
    """A value of a dotted key under its name of today."""
    values = VALUES.get(re.sub(r"^teachers\.\d{1,3}\.", "", key), {})
    return values.get(value, value) if isinstance(value, str) else value


def current(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and their values as they are called today."""
    return {now: current_value(key, value) for key, value in flat.items() if (now := current_key(key)) is not None}


def first_names(key: str, value: Any) -> tuple[str, Any]:
    """A key and its value as they were first called, so that what is hashed over them stays."""
    parents, _, last = key.rpartition(".")
    section = parents.rpartition(".")[2]
    for old, new in KEYS.items():
        if new == last and old.partition(".")[0] == section:
            key = f"{parents}.{old.partition('.')[2]}"
    for old_value, new_value in VALUES.get(f"{section}.{last}", {}).items():
        value = old_value if value == new_value else value
    return key, value


def update(document: dict[str, Any], prefix: str = "") -> list[str]:
    """Renames keys and values of a recipe's document in place; `old is now new` for each."""
    said = []
    for key, value in list(document.items()):
        dotted, items = prefix + str(key), value if isinstance(value, list) else []
        for number, item in enumerate(items):
            if isinstance(item, dict):
                said += update(item, f"{dotted}.{number}.")
        if isinstance(value, dict):
            said += update(value, f"{dotted}.")
        now, new = current_key(dotted), current_value(dotted, value)
        if now != dotted:
            del document[key]
            said.append(f"{dotted} {'is no longer a key' if now is None else f'is now {now}'}")
        if now is not None and (now != dotted or new is not value):
            document[now.rpartition(".")[2]] = new
        if new is not value:
            said.append(f"{dotted}={value} is now {new}")
    return said
