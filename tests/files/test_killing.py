"""What kills a program before each change of a file sees them all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import killing
from conftest import ROOT
from programs import run_script


def test_each_change_is_a_moment(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "old").write_text("old")

    def work() -> None:
        print("begins")
        (tmp_path / "elsewhere").write_text("is not counted")
        part = folder / ".new.tmp"
        part.write_text("new")
        part.replace(folder / "new")
        with (folder / "old").open("a") as stream:  # nothing is emptied
            stream.write("er")
        (folder / "x" / "y").mkdir(parents=True)
        os.truncate(folder / "old", 2)
        shutil.rmtree(folder / "x")
        if os.fork() == 0:
            (folder / "of a child").write_text("is the child's")
            os._exit(0)
        os.wait()

    seen = []
    for moment, ended in killing.each_moment(work, folder):
        assert ended.printed == "begins\n"
        assert len(ended.changes) == moment
        seen.append((ended.changes[-1].replace(str(folder), ""), sorted(path.name for path in folder.rglob("*"))))
    assert seen == [
        ("open /.new.tmp", ["old"]),
        ("opened, empty /.new.tmp", [".new.tmp", "old"]),
        ("os.rename /.new.tmp -> /new", [".new.tmp", "old"]),
        ("open /old", ["new", "old"]),
        ("os.mkdir /x/y", ["new", "old"]),  # which fails
        ("os.mkdir /x", ["new", "old"]),
        ("os.mkdir /x/y", ["new", "old", "x"]),
        ("os.truncate /old", ["new", "old", "x", "y"]),
        ("os.rmdir /x/y", ["new", "old", "x", "y"]),
        ("os.rmdir /x", ["new", "old", "x"]),
    ]
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert (folder / "old").read_text() == "old"


def test_how_a_program_ends_is_told(tmp_path: Path) -> None:
    def leaves() -> None:
        raise SystemExit(75)

    def fails() -> None:
        raise ValueError("a fault of ours")

    assert killing.run(leaves, tmp_path).code == 75
    ended = killing.run(fails, tmp_path)
    assert ended.code == 1
    assert "a fault of ours" in ended.printed


def test_a_process_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'file').write_text(sys.argv[2])")
    folder = tmp_path / "folder"
    folder.mkdir()
    killer = ROOT / "tests/killing.py"
    assert run_script(killer, 1, folder, script, folder, "text").returncode == -9
    assert not list(folder.iterdir())
    assert run_script(killer, 2, folder, script, folder, "text").returncode == -9
    assert (folder / "file").read_text() == ""
    done = run_script(killer, 3, folder, script, folder, "text")
    assert (done.returncode, done.stderr, (folder / "file").read_text()) == (0, "2 moments\n", "text")
