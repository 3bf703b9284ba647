"""Numbers and errors of the command lines."""

from __future__ import annotations

import pytest

from conftest import ROOT
from deit_kd import cli


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    command = train_main if words[0] == "train.py" else cli.main
    with pytest.raises(SystemExit) as stopped:
        command(list(words[words[0] == "train.py" :]))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def train_main(words: list[str]) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_of_this_test", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    train.main(words)


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "quickstart", "x.png", "--batch-size", str(10**20)),
        ("predict", "quickstart", "x.png", "--top", "0"),
        ("predict", "quickstart", "x.png", "--img-size", "1" * 5000),
        ("evaluate", "quickstart", "--batch-size", "nan"),
        ("cache-teacher", "quickstart", "--output", "x", "--shard-mb", "nan"),
        ("cache-teacher", "quickstart", "--output", "x", "--shard-mb", "inf"),
        ("cache-teacher", "quickstart", "--output", "x", "--shard-mb", "0"),
        ("cache-teacher", "quickstart", "--output", "x", "--views", "0"),
        ("plan", "quickstart", "--gpus", str(10**30)),
        ("plan", "quickstart", "--nodes", "-1"),
        ("plan", "quickstart", "--images", "1" + 400 * "0"),
        ("pack", "--data", "x", "--output", "y", "--short-side", "0"),
        ("train.py", "--recipe", "quickstart", "--max-steps", "0"),
        ("train.py", "--recipe", "quickstart", "--device-batch-size", str(10**30)),
    ],
)
def test_a_number_out_of_bounds_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *words)
    assert f"error: argument {words[-2]}: must be a" in line
    assert " from " in line
    assert len(line) < 300


def test_two_dashes_are_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "train.py", "--recipe", "quickstart", "--resume=--").endswith("argument --resume: -- is no value")
    assert refused(capsys, "plan", "quickstart", "--data=--").endswith("argument --data: -- is no value")


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--recipe", "quickstart", "--api-key=S3CR3T"),
        ("train.py", "--api-key=S3CR3T"),
        ("predict", "quickstart", "x.png", "--api-key=S3CR3T"),
        ("predict", "quickstart", "x.png", "--api-key", "S3CR3T"),
        ("predict", "quickstart", "x.png", "--device", "https://u:S3CR3T@h"),
        ("plan", "quickstart", "--gpus", "token=S3CR3T"),
        ("token=S3CR3T",),
    ],
)
def test_errors_show_no_secret(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "S3CR3T" not in refused(capsys, *words)
