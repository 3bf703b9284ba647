"""A grid: the product of overrides, resumable, refused as a whole."""

from __future__ import annotations

import csv
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import killing
from conftest import ROOT, SMALL, wait_until
from deit_kd import plots  # noqa: F401  # here, not in each forked child
from deit_kd import recipe as recipes
from deit_kd import sweep as grid
from deit_kd.cli import main
from deit_kd.errors import UserError
from deit_kd.sweep import _cells, _held, _name, run_grid
from programs import Program, run_script

AXES = ["distill.power=2,4", "seed=0,1"]
QUICK = [*SMALL, "epochs=1", "optim.warmup_epochs=0", "teacher.name=resnet10t", "teacher.weights=random"]


@pytest.mark.usefixtures("pictures")
@pytest.mark.slow
def test_a_grid_runs_once_and_is_extended(fashion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "grid"
    command = ["grid", "quickstart", *AXES, *QUICK, "--data", str(fashion_folder), "--output", str(output), "--jobs", "2"]
    main(command)
    assert "4 runs in" in capsys.readouterr().out
    rows = list(csv.DictReader((output / "grid.csv").open()))
    assert [(row["distill.power"], row["n"]) for row in rows] == [("2", "2"), ("4", "2")]
    assert all(0 <= float(row["top1"]) <= 100 and float(row["standard_error"]) >= 0 for row in rows)
    table = (output / "grid.md").read_text()
    assert "deit-kd grid quickstart distill.power=2,4 seed=0,1" in table
    assert table.splitlines()[0].rstrip("`").endswith("--data DATA --output grid")
    assert "240 training images" in table
    assert (output / "grid.png").stat().st_size > 5000
    written = (output / "power=2,seed=0" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(output / "power=4,seed=1")
    main([*command[:2], "distill.power=2,4", "seed=0,1", *command[4:]])
    assert "4 runs in" in (said := capsys.readouterr().out)
    assert "3 of them complete" in said
    assert (output / "power=2,seed=0" / "metrics.jsonl").stat().st_mtime_ns == written
    assert (output / "power=4,seed=1" / "student" / "README.md").exists()
    with pytest.raises(SystemExit):  # not the old numbers under another command
        main([*command, "optim.lr=9"])
    assert "holds a run of another recipe (optim.lr: 0.003 -> 9.0); give another --output" in capsys.readouterr().err


def test_the_axes() -> None:
    cells = _cells(["a=1,2", "b=[0.9, 0.95],[0.8, 0.9]", "c=x"])
    assert len(cells) == 4
    assert cells[1] == {"a": "1", "b": "[0.8, 0.9]", "c": "x"}


def test_the_papers_ablations_are_one_grid() -> None:
    axes = ["distill.normalization=none,l2,batch", "projector.depth=1,2,3", "distill.power=1,2,4,5", "seed=0,1,2"]
    cells = _cells(axes)
    assert len(cells) == 108
    assert len({_name(cell, cells) for cell in cells}) == 108
    for cell in cells:
        recipes.load(ROOT / "recipes/quickstart/quickstart.yaml", [f"{key}={value}" for key, value in cell.items()])


def test_a_grid_refuses_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)power=0.*distill.power: must be at least 1"):
        run_grid("quickstart", ["distill.power=0,1"], tmp_path / "grid", None, 1)
    with pytest.raises(UserError, match="names a value twice"):
        run_grid("quickstart", ["seed=0,0"], tmp_path / "grid", None, 1)
    with pytest.raises(UserError, match="is no axis of a grid"):
        run_grid("quickstart", ["power"], tmp_path / "grid", None, 1)
    assert not (tmp_path / "grid").exists()


@pytest.mark.slow
def test_a_failed_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 1 runs failed, the first: name=nonsense,seed=0: error: teacher.name=nonsense"):
        run_grid("quickstart", ["teacher.name=nonsense", "seed=0"], tmp_path / "grid", None, 1)


def test_the_verbs_start_at_once() -> None:
    done = subprocess.run([sys.executable, "-m", "deit_kd", "grid", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "key=value,value" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "deit_kd", "grid", "quikstart"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error:")
    assert "did you mean quickstart" in done.stderr


@pytest.fixture(scope="module")
def orphaned(fashion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A grid that was killed while its first run trained, and given again: its folder, its words, what the second said."""
    output = tmp_path_factory.mktemp("orphaned") / "grid"
    words = ["grid", "quickstart", "distill.power=2,4", *QUICK, "--data", str(fashion_folder), "--output", str(output)]
    first = Program("-m", "deit_kd", *words)
    log = output / "power=2.log"
    wait_until(lambda: log.exists() and log.stat().st_size, first)  # the run itself has written: it lives, and holds its lock
    first.kill()
    first.wait()
    with (output / "power=2.lock").open("a") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done = run_script("-m", "deit_kd", *words)
    assert done.returncode == 0, done.stderr
    return output, words, done.stderr


@pytest.mark.slow
def test_a_run_that_outlives_its_grid_is_waited_for(orphaned: tuple[Path, list[str], str]) -> None:
    output, _, said = orphaned
    assert "power=2: another process runs it" in said
    assert "waiting for 1 run of another process, power=2" in said
    assert "power=2 is complete" in said
    assert (output / "power=2.log").read_text().count("steps   ") == 1, "it was not begun again"
    assert [row["n"] for row in csv.DictReader((output / "grid.csv").open())] == ["1", "1"]


@pytest.mark.usefixtures("pictures")
@pytest.mark.slow
def test_a_grid_that_is_killed_before_each_change_ends_alike(orphaned: tuple[Path, list[str], str]) -> None:
    output, words, _ = orphaned
    tables = {name: (output / name).read_bytes() for name in ("grid.csv", "grid.md", "grid.png")}
    for path in {*output.glob("grid.*"), *output.glob("*.lock"), *output.glob(".*")}:
        path.unlink()
    moments = 0
    for moment, killed in killing.each_moment(lambda: main(words), output):
        ended = killing.run(lambda: main(words), output)
        assert ended.code == 0, ended.printed
        assert {name: (output / name).read_bytes() for name in tables} == tables, (moment, killed.changes[-1])
        assert not list(output.glob(".grid*")), "nothing half-written stays"
        moments += 1
    assert moments > 8


@pytest.mark.slow
def test_a_grid_leaves_alone_what_others_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grid", "quickstart", "seed=0", "teacher.name=nonsense", "--output", str(tmp_path / "grid")]
    (tmp_path / "grid/a run").mkdir(parents=True)
    for name, told in (("notes", "holds a run, notes, which"), ("a run/recipe.yaml", ""), ("grid.csv", "holds grid.csv, which")):
        (tmp_path / "grid" / name).write_text("of others")
        with pytest.raises(SystemExit):
            main(words)
        error = capsys.readouterr().err
        assert f"{told} deit-kd grid did not make; give another --output" in error if told else "1 of 1 runs failed" in error
        assert (tmp_path / "grid" / name).read_text() == "of others"
        for path in (tmp_path / "grid").glob("*seed*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / "grid/grid.md").unlink(missing_ok=True)
        (tmp_path / "grid/grid.csv").unlink(missing_ok=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder"):
        run_grid("quickstart", ["seed=0"], tmp_path / "file", None, 1)


def test_names_hold_no_secret_and_are_those_of_before_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = [f"https://anna:{word}@host/data" for word in ("hunter22", "hunter33")]
    tokens = [f"hf_{letter * 30}" for letter in "ab"]
    for values in (secret, tokens, [f"x?token={token}" for token in tokens]):
        cells = _cells([f"data.name={','.join(values)}", "seed=0,1"])
        names = [_name(cell, cells) for cell in cells]
        assert len(set(names)) == 4
        assert not [name for name in names if "hunter" in name or "aaa" in name or "bbb" in name]
        assert [_name(cell, more) for cell in cells for more in [_cells([f"data.name={','.join(values)}", "seed=0,1,2"])]] == names
    for overrides, wanted in (
        (["distill.power=2,4", "seed=0,1"], ["power=2,seed=0", "power=2,seed=1", "power=4,seed=0", "power=4,seed=1"]),
        (["teacher.weights=/home/anna/a b.pth,random"], ["weights=_home_anna_a_b.pth", "weights=random"]),
        (["optim.betas=[0.9, 0.95],[0.8, 0.9]"], ["betas=_0.9,_0.95_", "betas=_0.8,_0.9_"]),
        (["seed=3"], ["seed=3"]),
    ):
        cells = _cells(overrides)
        assert [_name(cell, cells) for cell in cells] == wanted
    cells = _cells(["name=a/b,a_b,a:b"])
    assert _name(cells[0], cells) == "name=a_b", "as before"
    assert len({_name(cell, cells) for cell in cells}) == 3
    cells = _cells([f"name={'é' * 200},{'é' * 201}"])
    assert len({_name(cell, cells) for cell in cells}) == 2
    assert max(len(os.fsencode(_name(cell, cells))) for cell in cells) <= 240
    monkeypatch.setattr(grid, "_train", lambda *_: "failed")
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        run_grid("quickstart", [f"teacher.name={','.join(secret)}"], tmp_path / "grid", None, 1)
    printed = capsys.readouterr()
    told = [printed.out, printed.err, *(path.name for path in tmp_path.rglob("*"))]
    told += [path.read_text() for path in (tmp_path / "grid").iterdir() if path.suffix in (".md", ".csv")]
    assert "host/data (2)" in printed.out
    assert "hunter" not in "".join(told)


def test_a_grid_is_refused_in_a_run_and_among_the_data(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml", "metrics.jsonl", "student/recipe.yaml"):
        (run / name).write_text("{}")
        with pytest.raises(UserError, match=r"run: holds .*which deit-kd grid did not make; give another --output"):
            run_grid("quickstart", ["seed=0"], run, None, 1)
    for name in ("run.json", "metrics.jsonl"):
        (run / name).unlink()
    with pytest.raises(UserError, match=r"run: holds recipe.yaml, which"):
        run_grid("quickstart", ["seed=0"], run, None, 1)
    with pytest.raises(UserError, match="is where the data are"):
        run_grid("quickstart", ["seed=0"], tmp_path / "data/train/grid", tmp_path / "data", 1)
    assert sorted(path.name for path in run.iterdir()) == ["recipe.yaml", "student"]
    assert not (tmp_path / "data").exists()


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with _held(tmp_path / "lock", None) as lock:
        assert lock is not None
    assert f"{tmp_path}: this disk has no locks (Function not implemented)" in capsys.readouterr().err
