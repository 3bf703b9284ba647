"""Each row of the objectives' table is true of the function that it names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from deit_kd import losses
from deit_kd.export.citations import PAPERS
from deit_kd.recipe.objectives import (
    FEATURE_OBJECTIVES,
    LOGIT_OBJECTIVES,
    POWER,
    VECTORS,
    FeatureObjective,
    couples_samples,
)
from objectives import COUPLED, LOSS_OF

ROWS = {**LOGIT_OBJECTIVES, **FEATURE_OBJECTIVES}
# Compared elsewhere: a memory over steps, maps of several levels, and a schedule over epochs.
OTHER_SHAPES = ("noise_contrastive", "hierarchical_context", "dense_hard_distillation")
VALUES = {
    "temperature": 2.0, "target_weight": 1.0, "nontarget_weight": 8.0, "inter_weight": 1.0, "intra_weight": 1.0, "gamma": 1.5,
    "power": 4.0, "normalization": "batch",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_keys_of_a_loss_are_parameters_of_its_function(name: str) -> None:
    parameters = inspect.signature(getattr(losses, name)).parameters
    assert set(ROWS[name].keys) <= set(parameters)
    if name in LOGIT_OBJECTIVES:
        assert LOGIT_OBJECTIVES[name].reads_labels == ("labels" in parameters)


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(OTHER_SHAPES)))
def test_couples_samples_is_true(name: str) -> None:
    """The mean of the losses of two halves is the loss of the batch, unless it couples samples."""
    generator = torch.Generator().manual_seed(0)
    maps = name in FEATURE_OBJECTIVES and not set(FEATURE_OBJECTIVES[name].taps) & set(VECTORS)
    student, teacher, means = torch.randn(3, 8, 6, *([4, 4] if maps else []), generator=generator, dtype=torch.float64)
    arguments = {key: VALUES[key] for key in ROWS[name].keys}
    labels = torch.arange(8) % 6

    def loss(rows: slice) -> torch.Tensor:
        tensors = [student[rows], teacher[rows]]
        if name in FEATURE_OBJECTIVES and FEATURE_OBJECTIVES[name].reads_class_means:
            tensors = [student[rows], means[rows]] if name == "mean_direction" else [*tensors, means[rows]]
        given = {"labels": labels[rows]} if name in LOGIT_OBJECTIVES and LOGIT_OBJECTIVES[name].reads_labels else {}
        return getattr(losses, name)(*tensors, **arguments, **given)

    halves = (loss(slice(0, 4)) + loss(slice(4, 8))) / 2
    assert torch.isclose(loss(slice(0, 8)), halves, rtol=1e-9) != couples_samples(name)


@pytest.mark.slow
def test_a_loss_is_added_by_its_function_and_its_row(
    train_cli: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CONTRIBUTING says: recipe, checks, training, card and citation take it from there."""

    def cubic(student: torch.Tensor, teacher: torch.Tensor, power: float) -> torch.Tensor:
        return (student - teacher).abs().pow(power).mean()

    monkeypatch.setattr(losses, "cubic", cubic, raising=False)
    monkeypatch.setitem(FEATURE_OBJECTIVES, "cubic", FeatureObjective(paper="romero2015fitnets", keys={"power": POWER}))
    options = ["--recipe", "quickstart", "--output", tmp_path / "run", "--max-steps", 2, "global_batch_size=16", "run.workers=0"]
    code, printed = train_cli(*options, "distill.feature_loss=cubic", "distill.power=0.5", "distill.normalization=null")
    assert code == 2
    assert "distill.power: must be at least 1, got 0.5" in printed
    code, printed = train_cli(*options, "distill.feature_loss=cubic", "distill.power=3", "run.log_every_steps=1")
    assert code == 0, printed
    assert "FitNets" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_every_loss_that_couples_samples_is_tried_over_layouts() -> None:
    assert {name for name in ROWS if couples_samples(name)} <= {LOSS_OF[name] for name in COUPLED}


def row_for_people(name: str) -> str:
    row = ROWS[name]
    taps = projector = ""
    if isinstance(row, FeatureObjective):
        taps = ", ".join(row.taps)
        projector = row.projector or ("any" if not row.any_width else "any, or none")
    keys = ", ".join(f"`{key}` {allowed}" for key, allowed in row.keys.items())
    return f"| `{name}` | {keys} | {taps} | {projector} | {'yes' if row.couples_samples else ''} |"


def test_the_table_for_people_is_what_the_rows_say() -> None:
    page = (ROOT / "deit_kd" / "losses" / "README.md").read_text()
    shown = re.findall(r"^\| `.*$", page.partition("## What each reads")[2], re.MULTILINE)
    assert shown == [row_for_people(name) for name in ROWS]


def test_the_sources_in_the_table_for_people_are_those_of_the_rows() -> None:
    page, source, seen = (ROOT / "deit_kd" / "losses" / "README.md").read_text().partition("## What each reads")[0], "", set()
    for line in re.findall(r"^\| `\w+` \|.*$", page, re.MULTILINE):
        name, _, given, *_ = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:]]
        source = source if given.startswith("the same") or "the same" in given or not re.search(r"\d{4}", given) else given
        _, _, authors, _, year = PAPERS[ROWS[name.strip("`")].paper]
        assert authors.split(",")[0] in source, (name, source)
        assert str(year) in source
        seen.add(name.strip("`"))
    assert seen == set(ROWS)
