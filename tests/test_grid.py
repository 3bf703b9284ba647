"""A grid: the product of overrides, resumable, refused as a whole."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

from deit_kd import recipe as recipes
from deit_kd.cli import main
from deit_kd.errors import UserError
from deit_kd.grid import _cells, _name, run_grid

AXES = ["distill.power=2,4", "seed=0,1"]
QUICK = [*SMALL, "epochs=1", "optim.warmup_epochs=0", "teacher.name=resnet10t", "teacher.weights=random"]


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
    axes = ["distill.normalisation=none,l2,batch", "projector.depth=1,2,3", "distill.power=1,2,4,5", "seed=0,1,2"]
    cells = _cells(axes)
    assert len(cells) == 108
    assert len({_name(cell, cells) for cell in cells}) == 108
    for cell in cells:
        recipes.load(ROOT / "recipes" / "quickstart.yaml", [f"{key}={value}" for key, value in cell.items()])


def test_a_grid_refuses_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)power=0.*distill.power: must be at least 1"):
        run_grid("quickstart", ["distill.power=0,1"], tmp_path / "grid", None, 1)
    with pytest.raises(UserError, match="names a value twice"):
        run_grid("quickstart", ["seed=0,0"], tmp_path / "grid", None, 1)
    with pytest.raises(UserError, match="is no axis of a grid"):
        run_grid("quickstart", ["power"], tmp_path / "grid", None, 1)
    assert not (tmp_path / "grid").exists()


def test_a_failed_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 2 runs failed, the first: seed=0: error: teacher.name=nonsense"):
        run_grid("quickstart", ["teacher.name=nonsense", "seed=0,1"], tmp_path / "grid", None, 1)


def test_the_verbs_start_at_once() -> None:
    done = subprocess.run([sys.executable, "-m", "deit_kd", "grid", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "key=value,value" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "deit_kd", "grid", "quikstart"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error:")
    assert "did you mean quickstart" in done.stderr
