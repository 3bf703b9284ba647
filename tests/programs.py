"""Programs of this project as processes of their own, forked from one that has imported torch and timm: a start takes little of the seconds
that the imports take."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "timm", "accelerate", "matplotlib", "train", "deit_kd.tasks.classification"])


class Program:
    """`python ARGUMENTS` in the project's folder, with a `Popen`'s methods; arguments are train.py's, or `-m` and a module's.

    Args:
        arguments: after `python`.
        env: the environment; this process's by default.
        cwd: where it runs.
        before: is called in the new process first.
    """

    def __init__(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        before: Callable[[], object] | None = None,
    ):
        words = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory(prefix="program")
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process = FORKS.Process(target=_run, args=(words, dict(os.environ if env is None else env), cwd, self._files, before))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("the program", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # else the number may be another process's
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def printed(self) -> tuple[str, str]:
        """What it printed until now, to stdout and to stderr."""
        out, err = (file.read_text(errors="backslashreplace") if file.exists() else "" for file in self._files)
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.printed()


def _run(words: list[str], environment: dict[str, str], cwd: Path, files: list[Path], before: Callable[[], object] | None) -> None:
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.setsid()
    tempfile.tempdir = None  # TMPDIR is another
    multiprocessing.set_start_method(None, force=True)  # processes that it starts are what they are elsewhere
    if before is not None:
        before()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def run_script(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in the project's folder to its end: train.py and the verbs forked, anything else afresh."""
    words = list(map(str, arguments))
    if words[0] not in ("train.py", "-m") or (words[0] == "-m" and words[1] != "deit_kd"):
        return subprocess.run(
            [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout
        )
    program = Program(*words, env=env, cwd=cwd)
    code = program.wait(timeout)
    return subprocess.CompletedProcess(words, code, *program.printed())
