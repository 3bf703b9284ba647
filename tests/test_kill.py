"""A run that is killed again and again ends in the weights of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, run_script

from deit_kd.tracking import read_metrics

STEPS = 240
COMMAND = [
    *("train.py", "--recipe", "quickstart", "--max-steps", STEPS, *SMALL, "teacher.name=resnet10t", "teacher.weights=random"),
    *("epochs=40", "ema_decay=0.9", "run.save_every_steps=1", "run.log_every_steps=1", "run.eval_every_epochs=40", "run.workers=1"),
]


def steps_of(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(output.glob("checkpoints/step_*"))]


def kill_at(moment: str, process: subprocess.Popen[bytes], output: Path, rng: random.Random) -> None:
    """kill -9 of the whole group, after some time in training, inside a save, or while old checkpoints are pruned."""
    folder, deadline = output / "checkpoints", time.monotonic() + 90
    before = steps_of(output)[-1:]
    while process.poll() is None and time.monotonic() < deadline:
        if steps_of(output)[-1:] != before:  # it trains
            break
    if moment == "any":
        time.sleep(rng.uniform(0, 0.5))
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "save" and list(folder.glob(".step_*.tmp/*.safetensors")):
            break
        if moment == "prune" and len(steps_of(output)) > 2:
            break
        if moment == "any":
            break
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_script(*COMMAND, "--data", fashion_folder, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_in_the_same_weights(
    kills: int, undisturbed: Path, fashion_folder: Path, tmp_path: Path
) -> None:
    output, seed = tmp_path / "run", random.SystemRandom().randrange(2**32)
    rng, moments = random.Random(seed), ["save", "prune", "any"]
    command = [sys.executable, *map(str, COMMAND), "--data", str(fashion_folder), "--output", str(output)]
    for number in range(kills):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
            kill_at(moments[number % 3], process, output, rng)
        assert process.returncode == -signal.SIGKILL, f"seed {seed}: {(tmp_path / 'log').read_text()[-2000:]}"
        logged = [line["step"] for line in read_metrics(output) if line["kind"] == "train"]
        assert steps_of(output)[-1] >= max(logged) - 1, f"seed {seed}: lost more than save_every_steps"
    done = run_script(*COMMAND, "--data", fashion_folder, "--output", output)
    assert done.returncode == 0, done.stderr
    for file in ("student/model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors"):
        assert (output / file).read_bytes() == (undisturbed / file).read_bytes(), f"seed {seed}: {file}"
    states = [json.loads((run / f"checkpoints/step_{STEPS:08d}/state.json").read_text()) for run in (output, undisturbed)]
    assert states[0]["sha256"] == states[1]["sha256"]
    assert not list(output.glob("checkpoints/.step*")), "nothing half-written stays"
