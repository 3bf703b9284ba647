"""Standard output and error that nobody reads, that are closed, or whose disk is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import killing
import train
from conftest import ROOT, SMALL
from deit_kd import cli

TALK = """
import logging, os, sys, warnings
from tqdm import tqdm
from deit_kd.cli import streams
streams.forgive()
logging.basicConfig()
held = open(sys.argv[1], "w")
assert held.fileno() > 2, "a file of ours has the number of a standard stream"
for number in range(3000):
    print("line", number)
    print("line", number, file=sys.stderr, flush=True)
    tqdm.write(f"line {number}", file=sys.stderr)
    warnings.warn(f"warning {number}")
    logging.warning("line %s", number)
    if number % 1000 == 0:
        os.system("echo a child; echo a child >&2")
for _ in tqdm(range(100)):
    pass
held.write(f"{streams.is_gone(sys.stdout)} {streams.is_gone(sys.stderr)}")
sys.exit(75)
"""


def broken_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_terminal() -> int:
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize(("stream", "gone"), [(broken_pipe, True), (full_disk, False), (closed_terminal, True)])
@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_a_program_goes_on_and_ends_with_its_own_code(stream: Callable[[], int], gone: bool, which: str, tmp_path: Path) -> None:
    bad = stream()
    places = {name: bad if which in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    done = subprocess.run([sys.executable, "-c", TALK, tmp_path / "file"], cwd=ROOT, check=False, **places)  # type: ignore[call-overload]
    os.close(bad)
    assert done.returncode == 75
    assert (tmp_path / "file").read_text() == " ".join(str(gone and which in (name, "both")) for name in places)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    command = f"exec '{sys.executable}' -c '{TALK}' '{tmp_path / 'file'}' {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "file").exists()


def test_what_an_encoding_lacks_is_escaped() -> None:
    script = "from deit_kd.cli import streams; streams.forgive(); print('caf\\u00e9 \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.stdout == b"caf\\xe9 \\udcff\n"


def run_into(stream: Callable[[], int], work: Callable[[], object], folder: Path) -> killing.Ended:
    def wrapped() -> None:
        bad = stream()
        os.dup2(bad, 1)
        os.dup2(bad, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        work()
        sys.stdout.flush()  # as the interpreter does at its end

    return killing.run(wrapped, folder)


@pytest.mark.parametrize("stream", [broken_pipe, full_disk, closed_terminal])
def test_a_run_that_nobody_reads_comes_to_its_end(stream: Callable[[], int], fashion_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--recipe", "quickstart", "--data", str(fashion_folder), "--output", str(output), "--max-steps", "2", *SMALL]
    ended = run_into(stream, lambda: train.main([*options, "teacher.name=resnet10t", "teacher.weights=random"]), output)
    assert ended.code == 0
    assert (output / "student/README.md").exists()
    assert (output / "plots/loss.png").exists()
    refused = run_into(stream, lambda: train.main([*options, "optim.lr=nonsense"]), output)
    assert refused.code == 2


def test_a_verb_whose_reader_has_enough_ends_quietly(fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """predict stops; a verb that writes files does its work."""
    files = sorted(map(str, (fashion_folder / "val").rglob("*.png")))[:20]
    asked: list[Any] = []

    def noted(name: Any, formats: Any = None) -> Image.Image:
        asked.append(name)
        raise OSError("broken")

    def predict() -> None:
        monkeypatch.setattr("PIL.Image.open", noted)
        try:
            cli.main(["predict", "quickstart_teacher", *files, "--batch-size", "1"])
        finally:
            (tmp_path / "asked").write_text(str(len(asked)))

    ended = run_into(broken_pipe, predict, tmp_path)
    assert ended.code == 1, "the images that it did look at cannot be read"
    assert int((tmp_path / "asked").read_text()) < 5
    pack = ["pack", "--data", str(fashion_folder), "--output", str(tmp_path / "shards")]
    assert run_into(broken_pipe, lambda: cli.main(pack), tmp_path).code == 0
    assert (tmp_path / "shards/classes.json").exists()
