"""A run folder, a checkpoint and a student that version 0.1.0 wrote before its modules moved are still read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deit_kd
from conftest import ROOT

RUN = ROOT / "tests" / "reference" / "earlier_run"
WORDS = [
    "run.workers=0", "global_batch_size=16", "epochs=2", "run.log_every_steps=1", "run.save_every_steps=2",
    "student.model_args.embed_dim=16", "student.model_args.depth=1", "student.model_args.num_heads=2",
]  # fmt: skip
LOSSES = (15.7149076, 15.7546005)  # of steps 3 and 4, as the code that wrote the checkpoint went on
LOGITS = (
    0.08923947,
    -0.03208961,
    0.06908537,
    0.01743274,
    -0.09856568,
    -0.08222662,
    0.03643097,
    0.06031267,
    -0.0905461,
    -0.00359309,
)


def test_the_student_gives_the_logits_that_it_gave() -> None:
    images = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        assert deit_kd.load_student(RUN / "student")(images)[0].tolist() == pytest.approx(LOGITS, abs=1e-5)


def test_the_run_goes_on_from_its_checkpoint(train_cli: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(RUN, output)
    code, printed = train_cli("--recipe", "quickstart", "--device", "cpu", "--output", output, "--max-steps", 4, *WORDS)
    assert code == 0, printed
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line and line["step"] > 2}
    assert losses == pytest.approx(dict(zip((3, 4), LOSSES, strict=True)), rel=1e-4)
