"""deit_kd: distil CNN teachers into DeiT students through token-feature projectors and the LogSum loss.

Importing the package is instant: torch and timm are imported with the first thing that needs them. The conv-stem students
are registered with timm when timm is imported, whichever comes first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deit_kd.models import Teacher, load_student, load_teacher

__version__ = "0.1.0"
__all__ = ["Teacher", "load_student", "load_teacher"]

_LAZY = {"load_student": "models", "load_teacher": "models", "Teacher": "models"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"deit_kd.{_LAZY[name]}"), name)
    if name in ("losses", "recipe"):  # `import deit_kd; deit_kd.losses.logsum_correlation(...)`
        return importlib.import_module(f"deit_kd.{name}")
    raise AttributeError(f"module 'deit_kd' has no attribute {name!r}")


class _RegisterWithTimm(importlib.abc.MetaPathFinder):
    """Steps in once, at `import timm`, and imports our students after it: `import deit_kd` alone stays instant."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            importlib.import_module("deit_kd.models.students")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("deit_kd.models.students")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
