"""Pictures of runs: what lies in them, also for runs of earlier versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from deit_kd import plots
from deit_kd import recipe as recipes
from deit_kd.models.teacher import RELEASED


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures as they are saved, by the name of their file."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.setdefault(file.stem, figure))
    return drawn


def run_of(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"seconds": 1.0, **line}) + "\n" for line in lines))
    return folder


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()}


def train(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step / 10, "lr": 1e-3, "seconds_data": 0.1, **values}


def test_the_loss_has_a_panel_a_term_over_epochs(tmp_path: Path, figures: dict[str, Any]) -> None:
    terms = {"loss": 3.0, "ce": 2.0, "kd_0": 1.0, "kd_1": 1.5, "feature_0": -9.0}
    others = {"agreement": 0.5, "feature_correlation": 0.1}
    plots.plot_run(run_of(tmp_path, train(5, **terms, **others), train(10, **{**terms, "loss": 2.0}, **others)))
    panels = [axes for axes in figures["loss"].axes if axes.get_lines()]
    assert [axes.get_title() for axes in panels] == list(terms), "statistics are no terms"
    assert [list(lines_of(axes).values()) for axes in panels[:2]] == [[[(0.5, 3.0), (1.0, 2.0)]], [[(0.5, 2.0), (1.0, 2.0)]]]
    assert panels[0].get_ylim() != panels[4].get_ylim(), "LogSum does not flatten the rest"
    assert figures["loss"].get_supxlabel() == "epochs"
    (axes,) = figures["agreement"].axes
    assert lines_of(axes) == {"agreement": [(0.5, 0.5), (1.0, 0.5)], "feature_correlation": [(0.5, 0.1), (1.0, 0.1)]}
    assert axes.get_xlabel() == "epochs"
    plt.close("all")


def test_runs_of_earlier_versions_are_drawn(tmp_path: Path, figures: dict[str, Any]) -> None:
    """The released student's own lines: `cosine`, and agreement of a batch."""
    shutil.copyfile(RELEASED / "quickstart/metrics.jsonl", tmp_path / "metrics.jsonl")
    written = plots.plot_run(tmp_path)
    assert sorted(path.stem for path in written) == ["agreement", "learning_rate", "loss", "projector", "time", "top1"]
    assert set(lines_of(figures["agreement"].axes[0])) == {"agreement", "cosine"}
    assert [axes.get_title() for axes in figures["loss"].axes if axes.get_lines()] == ["loss", "ce", "kd", "feature"]
    plt.close("all")


def test_lines_without_epochs_and_runs_without_steps(tmp_path: Path, figures: dict[str, Any]) -> None:
    line = {key: value for key, value in train(5, loss=1.0).items() if key != "epoch"}
    plots.plot_run(run_of(tmp_path, line, {**line, "step": 7}))
    assert list(lines_of(figures["loss"].axes[0]).values()) == [[(5.0, 1.0), (7.0, 1.0)]]
    assert plots.plot_run(run_of(tmp_path)) == []
    plt.close("all")


def test_answers_are_named_in_the_order_of_the_network(figures: dict[str, Any]) -> None:
    """Not in that of the data's classes."""
    report = {"images": 2, "ece": 0.1, "reliability": [{"images": 2, "confidence": 0.5, "accuracy": 0.5}]}
    plots.plot_report(report | {"confusion": [[0, 1], [1, 0]], "answers": ["dog", "cat"]}, ["cat", "dog"], Path("report.png"))
    axes = figures["report"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dog", "cat"]
    plt.close("all")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$\\frac{1}$", "\\$\\frac{1}\\$"),
        ("a\nb", r"a\nb"),
        ("\udce9", r"\udce9"),
        ("caf\u00e9", "caf\u00e9"),
        ("y" * 100, "y" * 39 + "\u2026"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_labels(name: str, shown: str) -> None:
    assert plots._label(name) == shown


def test_signs_without_a_glyph_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_faces", lambda: [])
    assert plots._label("\u732b-cat") == r"\u732b-cat"


@pytest.mark.parametrize(
    ("loss", "unit"),
    [
        (["distill.kd_loss=kl_distillation", "distill.temperature=1"], "nats"),
        (["distill.kd_loss=kl_distillation", "distill.temperature=4"], ""),
        (["distill.kd_loss=hard_distillation"], "nats"),
        (["distill.kd_loss=soft_distillation", "distill.temperature=1"], ""),
    ],
)
def test_a_kl_is_in_nats(loss: list[str], unit: str, tmp_path: Path, figures: dict[str, Any]) -> None:
    """The temperature squared, or one over the classes, multiplies what is not."""
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.load("quickstart", loss)))
    plots.plot_run(run_of(tmp_path, train(5, loss=3.0, ce=2.0, kd=1.0, feature=-9.0)))
    units = {axes.get_title(): axes.get_ylabel() for axes in figures["loss"].axes if axes.get_lines()}
    assert units == {"loss": "", "ce": "nats", "kd": unit, "feature": ""}
    plt.close("all")
