"""The command line of train.py: its options, its signals, and its errors."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deit_kd
from deit_kd import recipe as recipes
from deit_kd.cli.command_line import Parser, bounded, import_option
from deit_kd.errors import UserError
from deit_kd.text import error_for_terminal
from deit_kd.training.signals import REQUEUE, heard


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of train.py."""
    parser = Parser(
        prog="train.py",
        description="Distil a CNN teacher into a DeiT student, as a recipe says.",
        epilog=f"recipes:\n{recipes.overview()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", help="a name from below, such as deit_ti or deit_vkd:small, or the path of a YAML file")
    add("--data", type=Path, help="the folder of the data; Fashion-MNIST needs none, a subset of it is embedded")
    add("--output", type=Path, help="the run folder (default: runs/RECIPE, or the folder of the run that --recipe names)")
    add(
        "--resume",
        default="auto",
        help="auto (default): go on if the run folder holds a checkpoint; none: start anew; or a checkpoint",
    )
    add("--accept-changes", metavar="KEYS", help="go on although what these name is another now; a refusal says which to give")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add("--device-batch-size", type=bounded(int, 1, 10**6), help="most images on a device at once; more are accumulated")
    add("--max-steps", type=bounded(int, 1, 10**12), help="stop after so many optimizer steps; the schedule stays that of the run")
    add("--dry-run", action="store_true", help="print networks, shapes, memory and compute; train nothing")
    import_option(parser)
    add("--version", action="version", version=f"deit_kd {deit_kd.__version__}")
    add("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as optim.lr=1e-3 epochs=3")
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is None:
        parser.error(f"--recipe is missing: one of these, or the path of a YAML file\n{recipes.overview()}")
    return options


@contextmanager
def errors_in_one_line(output: Path) -> Iterator[None]:
    """Ends the program where the block raises a user's error: one line, and exit code 2; after Ctrl-C 130."""
    try:
        yield
        return
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"interrupted; {_kept(output)}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        message = f"{error.filename or output}: {error.strerror or error}; check the path and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left on the device of {output}: free some, or give another --output; the last whole checkpoint is kept"
            )
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if type(error).__name__ in ("InductorError", "BackendCompilerFailed"):
            message = f"torch.compile: {first}; install a C++ compiler, or set run.compile=false"
        elif type(error).__name__ == "OutOfMemoryError":
            message = f"out of memory on the device: halve what it holds at once with --device-batch-size ({first})"
        else:
            raise
    print(f"error: {error_for_terminal(message)}", file=sys.stderr)
    sys.exit(2)


def _kept(output: Path) -> str:
    if any((output / "checkpoints").glob("step_*")):
        return "its last checkpoint is kept, and the same command goes on from it"
    return "nothing was saved yet, and the same command begins anew"


def listen() -> None:
    """Before training, where nothing is to be saved, and after it, where everything is, a signal ends the run for another start."""
    for number in heard():
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: sys.exit(REQUEUE))
