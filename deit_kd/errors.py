"""The one exception that is the user's to mend; how a program ends outside of its environment."""

from __future__ import annotations

import sys
from typing import NoReturn


class UserError(ValueError):
    """Says in one line what is wrong, where, and what to do; entry points print it without a traceback."""


def outside_of_the_environment(error: ModuleNotFoundError) -> NoReturn:
    """Ends a program that was started with another Python than that of .venv, with a line and exit code 2."""
    remedy = "run .venv/bin/python instead, or `source .venv/bin/activate` first (bash launch/setup.sh makes .venv)"
    print(f"error: {error}: {remedy}", file=sys.stderr)
    sys.exit(2)
