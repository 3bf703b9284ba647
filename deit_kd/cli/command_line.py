"""What the command lines of train.py and `deit-kd` have in common: numbers with bounds, and errors that show no secret."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deit_kd.text import lines_for_terminal


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are shown as all others are; parsers of verbs are of this class, too."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse, which makes `--option=--` an empty list."""
        for word in sys.argv[1:] if args is None else args:
            if word == "--":
                break
            if re.fullmatch(r"--[\w-]+=--", word):
                self.error(f"argument {word[:-3]}: -- is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        super().error(lines_for_terminal(message))


def bounded(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: a finite number from `low` to `high`."""

    def number(text: str) -> int | float:
        try:
            value = kind(text) if len(text) <= 100 else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name} from {low:,} to {high:,}, got {text[:40]}")
        return value

    return number


def recipe_options(verb: argparse.ArgumentParser) -> None:
    """What every verb that loads a recipe takes."""
    verb.add_argument("recipe", help="a name in recipes/, such as deit_ti or deit_vkd:small, or the path of a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe; of a grid key=value,value,...")
    verb.add_argument("--data", type=Path, help="the folder of the data")


def import_option(parser: argparse.ArgumentParser) -> None:
    """What every command takes that may name a user's loss, projector or student."""
    words = "a Python file that registers your losses, projectors or students; may be given several times"
    parser.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE", help=words)
