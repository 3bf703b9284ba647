"""What a newcomer meets first: outside of the environment, without a recipe, with pictures where a data set is expected."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, SMALL
from deit_kd import recipe as recipes
from deit_kd.data import open_source
from deit_kd.errors import UserError
from deit_kd.evaluation import report
from deit_kd.files import warn

Cli = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("start", [["train.py", "--recipe", "quickstart"], ["-m", "deit_kd", "doctor", "quickstart"]])
def test_outside_of_the_environment_a_line_says_how_to_get_in(start: list[str]) -> None:
    done = subprocess.run([sys.executable, "-S", "-E", *start], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: No module named '\w+': run \.venv/bin/python instead, or `source \.venv/bin/activate` first", line)


def test_recipes_are_listed_one_a_line(train_cli: Cli) -> None:
    for arguments in ([], ["--recipe", "nothing of the kind"]):
        code, printed = train_cli(*arguments)
        assert code == 2
        for name in recipes.names():
            assert re.search(rf"^  {name} +\w.*$", printed, re.MULTILINE), name
    code, printed = train_cli("--help")
    assert code == 0
    assert "  quickstart " in printed


@pytest.mark.parametrize("source", ["fashion_mnist", "cifar10", "cifar100", "imagenette"])
@pytest.mark.parametrize(("layout", "remedy"), [("train/cat", "data.source=image_folder"), ("cat", "into .*/train/CLASS/")])
def test_pictures_are_recognized_where_a_data_set_is_expected(source: str, layout: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / layout).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / layout / "1.png")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=remedy):
        open_source(source, tmp_path, "train")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_download_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").touch()

    def fails(root: str, **_: object) -> None:
        (Path(root) / "FashionMNIST" / "raw").mkdir(parents=True)
        (Path(root) / "part.gz").touch()
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fails)
    with pytest.raises(UserError, match=r"downloading it failed \(no network\)"):
        open_source("fashion_mnist", tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_off_a_terminal_a_run_says_when_it_started_and_how_long_it_takes(
    fashion_folder: Path, tmp_path: Path, train_cli: Cli
) -> None:
    options = ["--data", fashion_folder, "--output", tmp_path / "run", *SMALL]
    code, printed = train_cli("--recipe", "quickstart_alone", *options, "--max-steps", 9)
    assert code == 0, printed
    assert re.search(r"^start   step 0/9  at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", printed, re.MULTILINE)
    etas = re.findall(r"^train   step (\d+)/9 .*  eta (\d+:\d\d:\d\d)$", printed, re.MULTILINE)
    assert [step for step, _ in etas] == ["4", "8", "9"]
    assert etas[-1][1] == "0:00:00"


def test_the_environment_is_made_without_a_warning(tmp_path: Path) -> None:
    """launch/setup.sh with a python that only pretends to make one: `cp` must not complain of a file copied onto itself."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_text((ROOT / "launch" / "setup.sh").read_text())
    (tmp_path / "requirements.lock").write_text("nothing\n")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nif [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi\n')
    fake.chmod(0o755)
    command = ["bash", str(tmp_path / "launch" / "setup.sh")]
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "PYTHON": str(fake)}
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / ".venv" / "requirements.lock").read_text() == "nothing\n"


def test_a_network_without_names_is_matched_by_order_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    warn.said.clear()
    names = ["0", "1", "10", "2"]
    assert report.match_labels(None, 4, names).tolist() == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert "warning: the network does not name its classes: its logit 2 is taken for 10;" in said
    assert "may mean 2: write its order to class_order.json" in said
    assert report.match_labels(tuple(names), 4, names).tolist() == [0, 1, 2, 3]
    assert report.match_labels(None, 2, ["cat", "dog"]).tolist() == [0, 1]
    assert capsys.readouterr().err == ""
