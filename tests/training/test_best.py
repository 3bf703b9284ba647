"""run.keep_best: what is exported, also after interruptions, and that it says how it was chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import SMALL
from deit_kd.export.publish import _same_numbers
from deit_kd.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str]]
# A learning rate that ruins what the first epochs learned: the best evaluation is not the last.
WORSE = ["optim.lr=0.003", "optim.schedule=multistep", "optim.min_lr=null", "optim.milestones=[2]", "optim.decay_rate=300"]
OPTIONS = [*SMALL, *WORSE, "epochs=4", "run.keep_best=true", "run.keep_checkpoints=9", "run.save_every_steps=10"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def checkpoint(run: Path, step: int, part: str, prefix: str) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "checkpoints" / f"step_{step:08d}" / f"{part}.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def best_line(run: Path) -> dict[str, Any]:
    (line,) = [line for line in read_metrics(run) if line["kind"] == "best"]
    return line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    import train

    run = tmp_path_factory.mktemp("best") / "run"
    train.main(["--recipe", "quickstart_alone", "--data", str(fashion_folder), "--output", str(run), *OPTIONS])
    return run


def test_the_best_weights_are_exported_and_marked(undisturbed: Path) -> None:
    evaluations = {line["step"]: line["top1"] for line in read_metrics(undisturbed) if line["kind"] == "eval"}
    line = best_line(undisturbed)
    assert line["step"] < 40, "the last epoch is not the best, or this test shows nothing"
    assert line["top1"] == evaluations[line["step"]] == max(evaluations.values()) > evaluations[40]
    assert same(exported(undisturbed), checkpoint(undisturbed, line["step"], "module", "student."))
    assert not same(exported(undisturbed), checkpoint(undisturbed, 40, "module", "student."))
    facts = json.loads((undisturbed / "run.json").read_text())["exported"]
    assert (facts["step"], facts["chosen_by"]) == (line["step"], "top1")
    card = (undisturbed / "student" / "README.md").read_text()
    assert "biased upward" in card
    assert "biased upward" in facts["note"]
    assert f"| Chosen | {line['step']} | {line['top1']:.2f} |" in card
    assert f"| Last (not these weights) | 40 | {evaluations[40]:.2f} |" in card
    assert f"top-1 {line['top1']:.2f} %" in _same_numbers(undisturbed)


def test_without_the_key_the_last_weights_are_exported(fashion_folder: Path, tmp_path: Path, train_cli: Cli) -> None:
    code, printed = train_cli(
        "--recipe", "quickstart_alone", "--data", fashion_folder, "--output", tmp_path / "run", *OPTIONS, "run.keep_best=false"
    )
    assert code == 0, printed
    assert same(exported(tmp_path / "run"), checkpoint(tmp_path / "run", 40, "module", "student."))
    assert "biased" not in (tmp_path / "run/student/README.md").read_text()


def test_interrupted_runs_keep_what_the_undisturbed_one_keeps(
    undisturbed: Path, fashion_folder: Path, tmp_path: Path, train_cli: Cli
) -> None:
    """Stopped at a step between evaluations, at one that was saved and not evaluated, and after the last one."""
    run, command = (
        tmp_path / "run",
        ["--recipe", "quickstart_alone", "--data", fashion_folder, "--output", tmp_path / "run", *OPTIONS],
    )
    step = best_line(undisturbed)["step"]
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "student")

    def forget(after: int, evaluated: bool) -> None:
        """The run as if it had been killed right behind the save of a step, before or after it was evaluated."""
        for folder in (run / "checkpoints").iterdir():
            if int(folder.name[-8:]) > after:
                shutil.rmtree(folder)
        lines = [json.dumps(line) for line in read_metrics(run) if line["step"] <= after and line["kind"] != "best"]
        lines = [
            line for line in lines if evaluated or not (json.loads(line)["kind"] == "eval" and json.loads(line)["step"] == after)
        ]
        (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))

    for after, evaluated in ((40, True), (40, False), (step, True), (step, False), (step - 10, True)):
        if after == 0:
            continue
        forget(after, evaluated)
        code, printed = train_cli(*command)
        assert code == 0, printed
        assert same(exported(run), exported(undisturbed)), (after, evaluated)
        assert best_line(run)["step"] == step
        assert best_line(run)["top1"] == best_line(undisturbed)["top1"]
        shutil.rmtree(run / "student")


@pytest.mark.slow
def test_averaged_weights_and_held_out_images_choose(fashion_folder: Path, tmp_path: Path, train_cli: Cli) -> None:
    common = ["--data", fashion_folder, "--output", tmp_path / "ema"]
    code, printed = train_cli("--recipe", "quickstart_alone", *common, *OPTIONS, "ema_decay=0.5")
    assert code == 0, printed
    line = best_line(tmp_path / "ema")
    assert line["chosen_by"] == "ema_top1"
    assert same(exported(tmp_path / "ema"), checkpoint(tmp_path / "ema", line["step"], "ema", ""))
    common = ["--data", fashion_folder, "--output", tmp_path / "tuned"]
    sizes = ["data.img_size=28", "global_batch_size=24", "epochs=4", "finetune.holdout=0.2", "run.workers=0", "optim.lr=0.001"]
    patience = ["finetune.patience_epochs=1", "run.keep_best=true", "run.keep_checkpoints=9"]
    code, printed = train_cli("--recipe", "finetune", *common, *sizes, *patience)
    assert code == 0, printed
    line, evaluations = best_line(tmp_path / "tuned"), [e for e in read_metrics(tmp_path / "tuned") if e["kind"] == "eval"]
    assert line["holdout_top1"] == max(each["holdout_top1"] for each in evaluations)
    assert same(exported(tmp_path / "tuned"), checkpoint(tmp_path / "tuned", line["step"], "module", "student."))
    card = (tmp_path / "tuned/student/README.md").read_text()
    assert "held out of training" in card
    assert "biased upward" not in card


def test_evaluations_before_the_key_was_set_are_not_among_those_that_chose(
    fashion_folder: Path, tmp_path: Path, train_cli: Cli
) -> None:
    run = tmp_path / "run"
    command = ["--recipe", "quickstart_alone", "--data", fashion_folder, "--output", run, *OPTIONS]
    code, printed = train_cli(*command, "run.keep_best=false", "--max-steps", 30)
    assert code == 0, printed
    code, printed = train_cli(*command)
    assert code == 0, printed
    evaluations = {line["step"]: line["top1"] for line in read_metrics(run) if line["kind"] == "eval"}
    chosen = best_line(run)
    assert max(evaluations[10], evaluations[20]) > chosen["top1"], "the test needs a better one before"
    last_better = max(step for step, top1 in evaluations.items() if top1 > chosen["top1"])
    card = (run / "student" / "README.md").read_text()
    assert "best of all evaluations" not in card
    assert f"best of the evaluations after step {last_better}" in card
