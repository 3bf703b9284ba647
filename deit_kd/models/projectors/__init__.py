"""Projectors between the features of student and teacher: those of this package, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from deit_kd.files import imports
from deit_kd.recipe.objectives import PROJECTORS, Key, ProjectorKind, check_registration

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
        UserError: no function or class, a name that is taken, or keys that are not its further parameters.
    """
    keys = dict(keys or {})
    name = check_registration("projectors.register", build, PROJECTORS, list(keys))
    PROJECTORS[name] = ProjectorKind(keys=keys, function=build)
    imports.note_source(build)
    return build
