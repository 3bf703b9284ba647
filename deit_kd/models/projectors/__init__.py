"""Projectors between the features of student and teacher: those of this package, and those that users register."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from deit_kd.errors import UserError
from deit_kd.files import imports
from deit_kd.recipe.objectives import PROJECTORS, Key, ProjectorKind

__all__ = ["Key", "register"]


def register(build: Callable[..., nn.Module], *, keys: Mapping[str, Key] | None = None) -> Callable[..., nn.Module]:
    """Makes a class or function a projector that recipes can name, as `projector.kind`.

    Args:
        build: (student width, teacher width, **keys) -> a module that maps [B,D] to [B,E]. On maps [B,D,H,W] it is applied at each place. A
            recipe names it by its own name.
        keys: its further parameters, which a recipe states in `projector.parameters`, and what each may be.

    Returns:
        `build`.

    Raises:
        UserError: no function or class, a name that is taken, or a key that is no parameter.
    """
    name = getattr(build, "__name__", "")
    if not callable(build) or not name.isidentifier():
        raise UserError(f"projectors.register: needs a class or a function with a name, got {build!r}"[:300])
    if name in PROJECTORS:
        raise UserError(f"projectors.register: there is a projector {name} already; rename yours")
    parameters, keys = inspect.signature(build).parameters, dict(keys or {})
    if missing := [key for key in keys if key not in parameters]:
        raise UserError(f"projectors.register: {name} has no parameter {', '.join(missing)}; add it, or leave it out of keys")
    PROJECTORS[name] = ProjectorKind(keys=keys, build=build)
    imports.note(Path(inspect.getsourcefile(build) or ""))
    return build
