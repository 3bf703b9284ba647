"""The verbs of `deit-kd`, a file a group; training itself is train.py."""

from __future__ import annotations

import errno
import sys

import deit_kd
from deit_kd import recipe as recipes
from deit_kd.cli import data, measure, streams, students
from deit_kd.cli.command_line import Parser, import_option
from deit_kd.errors import UserError
from deit_kd.files.imports import import_file
from deit_kd.text import error_for_terminal, for_terminal


def main(arguments: list[str] | None = None) -> None:
    """Runs a verb; user errors end in one line and exit code 2."""
    streams.forgive()
    parser = Parser(
        prog="deit-kd",
        description="What surrounds training: grids of runs, data, a look at the machine, and what is done with students.",
        epilog="Training itself is train.py; python train.py --help lists the recipes.",
    )
    parser.add_argument("--version", action="version", version=f"deit_kd {deit_kd.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    for add in (*data.VERBS, *students.VERBS, *measure.VERBS):
        add(verbs)
    for verb in verbs.choices.values():
        import_option(verb)
    words = sys.argv[1:] if arguments is None else arguments
    if not words or (words[0] not in verbs.choices and not words[0].startswith("-")):
        which = f"{words[0]!r} is no verb{recipes.nearest(words[0], verbs.choices)}" if words else "a verb is missing"
        print(f"error: deit-kd: {for_terminal(which)}; verbs: {', '.join(verbs.choices)}; see deit-kd --help", file=sys.stderr)
        sys.exit(2)
    options, more = parser.parse_known_args(arguments)  # overrides that stand behind an option are left over
    takes_more = hasattr(options, "overrides")
    if wrong := [word for word in more if word.startswith("-") or "=" not in word or not takes_more]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if takes_more:
        options.overrides += more
    try:
        for file in options.imports:
            import_file(file)
        options.run(options)
    except UserError as error:
        print(f"error: {error_for_terminal(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        place = error.filename or getattr(options, "output", None) or options.verb
        remedy = "; free some, or give another place" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"error: {for_terminal(f'{place}: {error.strerror or error}{remedy}')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; give the same command again", file=sys.stderr)
        sys.exit(130)
