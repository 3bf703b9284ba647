"""What is said where no verb, or a wrong one, is given; versions."""

from __future__ import annotations

import pytest

import deit_kd
import train
from deit_kd.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: deit-kd: a verb is missing; verbs: pack, class-means, cache-teacher,"),
        (["evalute"], "error: deit-kd: 'evalute' is no verb (did you mean evaluate?); verbs: pack,"),
        (["publsh", "--to", "x"], "'publsh' is no verb (did you mean publish?)"),
        (["a\nb"], "is no verb; verbs:"),
    ],
)
def test_a_verb_that_is_none(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("program", [main, train.main])
def test_the_version(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program(["--version"])  # type: ignore[operator]
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"deit_kd {deit_kd.__version__}\n"


def test_help_says_where_the_recipes_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "train.py --help lists the recipes" in " ".join(capsys.readouterr().out.split())
