"""Kills a program before each change of a file in turn: open for writing, rename, unlink, mkdir and their kin.

A test uses it so:

    for moment, ended in killing.each_moment(work, folder):
        ...  # `work` was killed there; what it left in `folder` is looked at, or the work is done again and compared

`work` runs in a forked child of this process. What it imports should be imported here before: a kill then takes some tens of
milliseconds.
On the command line, for a process of its own: `python tests/killing.py MOMENT FOLDER train.py --recipe ...` (or `-m deit_kd pack ...`)
is killed at that moment, and says how many moments there are if it ends before.

What C and C++ write themselves (safetensors, torch.save to a path) is not seen; the changes of files around it are.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = {  # name -> places of the paths and of their folders' descriptors in the event's arguments
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.utime": ((0, 3),),
}


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        code: its exit code; -9 when it was killed.
        changes: what it changed, or was about to, in words; the last one did not happen if it was killed.
        printed: on stdout and stderr.
    """

    code: int
    changes: list[str]
    printed: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def count(folders: Sequence[Path], note: Callable[[str], None], at: int | None) -> None:
    """From now on this process (not its children) notes each change in the folders, and kills itself at change `at`, from 1 on.

    A file that is opened to be overwritten or made has two moments: before, and when it is empty.
    """
    owner, roots, changes, busy = os.getpid(), [os.path.realpath(folder) for folder in folders], 0, False

    def moment(what: str) -> None:
        nonlocal changes
        changes += 1
        note(f"{what}\n")
        if changes == at:
            os.kill(owner, signal.SIGKILL)

    def whole_path(path: Any, folder: Any) -> str:
        path = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        return os.path.join(os.path.realpath(parent), name)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or os.getpid() != owner or (event != "open" and event not in EVENTS):
            return
        busy = True
        try:
            places = ((0, None),) if event == "open" else EVENTS[event]
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
                return
            if any(isinstance(arguments[path], int) or arguments[path] is None for path, _ in places):  # a descriptor
                return
            paths = [whole_path(arguments[path], None if folder is None else arguments[folder]) for path, folder in places]
            if not any(path == root or path.startswith(f"{root}{os.sep}") for path in paths for root in roots):
                return
            moment(f"{event} {' -> '.join(paths)}")
            if event == "open" and (arguments[2] & os.O_TRUNC or not os.path.exists(paths[0])):
                if changes + 1 == at:
                    os.close(os.open(paths[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
                moment(f"{event}ed, empty {paths[0]}")
        finally:
            busy = False

    sys.addaudithook(hook)  # it cannot be taken away again: this process must be one of its own


def run(work: Callable[[], object], *folders: Path, at: int | None = None) -> Ended:
    """Runs `work` in a forked child, killed before its change number `at` (from 1 on) of a file in the folders, if it comes so far."""
    with tempfile.TemporaryFile() as noted, tempfile.TemporaryFile() as printed:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
                count(folders, lambda text: os.write(noted.fileno(), text.encode("utf-8", "surrogateescape")) and None, at)
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of the test's process is tidied up twice
        _, status = os.waitpid(child, 0)
        texts = []
        for stream in (noted, printed):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "backslashreplace"))
    return Ended(os.waitstatus_to_exitcode(status), texts[0].splitlines(), texts[1])


def at_call(owner: Any, name: str, number: int, do: Callable[[], object]) -> None:
    """From now on in this process, a child, call `number` (from 1 on) of the function does something else first."""
    function, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            do()
        return function(*arguments, **kwargs)

    setattr(owner, name, wrapped)


def mount(folder: Path, options: str) -> None:
    """Puts a memory disk of its own before the eyes of this process, a child that has no threads yet."""
    libc, user, mounts, uid = ctypes.CDLL(None, use_errno=True), 0x10000000, 0x00020000, os.geteuid()
    recursive_private = 0x4000 | 1 << 18
    assert libc.unshare(mounts if uid == 0 else mounts | user) == 0, os.strerror(ctypes.get_errno())
    if uid:
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    for result in (
        libc.mount(b"none", b"/", None, recursive_private, None),
        libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode()),
    ):
        assert result == 0, os.strerror(ctypes.get_errno())


def each_moment(work: Callable[[], object], folder: Path, every: int = 1, first: int = 1) -> Iterator[tuple[int, Ended]]:
    """Kills `work` at its first change in `folder`, gives what happened, puts `folder` back, kills at the second change, and so on.

    Args:
        work: does the same in each call.
        folder: it and all in it is as it was before each try; it need not exist.
        every: moments that are tried: each, or each third, and so on.
        first: the first that is tried.

    Yields:
        The moment, and how the child ended; the folder is as the killed child left it.

    Raises:
        AssertionError: `work` does not end well when nobody kills it, or changes nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        if folder.exists():
            shutil.copytree(folder, before, symlinks=True)

        def put_back() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            if before.exists():
                shutil.copytree(before, folder, symlinks=True)

        whole = run(work, folder)
        assert whole.code == 0, whole.printed
        assert len(whole.changes) >= first, f"only {len(whole.changes)} changes: no moment is tried"
        for at in range(first, len(whole.changes) + 1, every):
            put_back()
            ended = run(work, folder, at=at)
            assert ended.killed, (at, ended)
            yield at, ended
        put_back()


def main(arguments: list[str]) -> None:
    """MOMENT FOLDER COMMAND...: a script and its arguments, or -m and a module's."""
    at, folder, *command = arguments
    changes: list[str] = []
    count([Path(folder)], changes.append, int(at))
    sys.argv = command[1:] if command[0] == "-m" else command
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        print(f"{len(changes)} moments", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
