"""What is right of a document that has faults of type, so that one message lists its impossible values too."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deit_kd.recipe.document import hints, kind_of


class Undecidable(Exception):
    """A check asked for a value that nobody knows."""


def _ask(*_: Any) -> NoReturn:
    raise Undecidable


class Faulty:
    """Stands where a value is missing or of the wrong type: whatever is asked of it raises `Undecidable`."""

    def __deepcopy__(self, _: Any) -> Faulty:
        return self


_ASKED = (
    "eq ne lt le gt ge hash bool float int index iter len contains getitem getattr call str repr format neg abs round "
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow"
)
for _name in _ASKED.split():
    setattr(Faulty, f"__{_name}__", _ask)
FAULTY = Faulty()


def well_typed(section: type, values: Any) -> Any:
    """A section of the schema whose missing or mistyped keys are `Faulty`; keys that it does not know are left out."""
    if not isinstance(values, dict):
        return FAULTY
    known = {}
    for field in dataclasses.fields(section):
        if field.name in values:
            known[field.name] = _value(hints(section)[field.name], values[field.name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            known[field.name] = FAULTY
    return section(**known)


def _value(hint: Any, value: Any) -> Any:
    kind = kind_of(hint)
    if kind.section is not None:
        return None if value is None and kind.null else well_typed(kind.section, value)
    if kind.repeats and dataclasses.is_dataclass(kind.items[0]) and isinstance(value, list):
        return tuple(well_typed(kind.items[0], each) for each in value)  # type: ignore[arg-type]
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError:
        return FAULTY


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
