"""A run that is killed again and again ends in the weights of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deit_kd.export  # noqa: F401  # once, instead of in each killed child
import killing
import train
from conftest import SMALL, wait_until
from deit_kd.training.metrics import read_metrics
from programs import Program, run_script

pytestmark = pytest.mark.slow

STEPS = 12
EVERY = 5  # changes of a file, from one that is drawn, so that all get a turn
COMMAND = [
    *("--recipe", "quickstart", "--max-steps", STEPS, *SMALL, "teacher.name=resnet10t", "teacher.weights=random", "epochs=40"),
    *("ema_decay=0.9", "run.save_every_steps=1", "run.log_every_steps=1", "run.eval_every_epochs=40", "run.keep_checkpoints=2"),
]


def work_on(output: Path, data: Path, *more: object) -> Callable[[], None]:
    return lambda: train.main([str(word) for word in (*COMMAND, "--data", data, "--output", output, *more)])


def steps_of(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(output.glob("checkpoints/step_*"))]


def assert_equal(output: Path, undisturbed: Path, steps: int = STEPS) -> None:
    for file in ("student/model.safetensors", f"checkpoints/step_{steps:08d}/optimizer.safetensors"):
        assert (output / file).read_bytes() == (undisturbed / file).read_bytes(), file
    states = [json.loads((run / f"checkpoints/step_{steps:08d}/state.json").read_text()) for run in (output, undisturbed)]
    assert states[0]["sha256"] == states[1]["sha256"]
    assert not list(output.glob("checkpoints/.step*")), "nothing half-written stays"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fashion_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = killing.run(work_on(output, fashion_folder), output)
    assert ended.code == 0, ended.printed
    return output


def test_killed_before_changes_of_files_it_ends_in_the_same_weights(
    undisturbed: Path, fashion_folder: Path, tmp_path: Path
) -> None:
    """The first session is killed before its first change, the next one a little later: in the start, in saves, in their pruning."""
    output, ended, reached = tmp_path / "run", None, 0
    for moment in range(random.SystemRandom().randint(1, EVERY), 10_000, EVERY):
        ended = killing.run(work_on(output, fashion_folder), output, at=moment)
        if not ended.killed:
            break
        logged = [line["step"] for line in read_metrics(output) if line["kind"] == "train"]
        saved = steps_of(output)[-1:] or [0]
        assert saved[0] >= max([*logged, 0]) - 1, f"moment {moment}: lost more than save_every_steps"
        assert saved[0] >= reached, f"moment {moment}: a checkpoint is lost"
        reached = saved[0]
    assert ended is not None
    assert ended.code == 0, ended.printed
    assert reached, "it was killed after its first checkpoint too"
    assert_equal(output, undisturbed)


@pytest.mark.parametrize("kills", [8])
def test_killed_at_any_moment_with_its_workers(kills: int, fashion_folder: Path, tmp_path: Path) -> None:
    seed, steps = random.SystemRandom().randrange(2**32), 160
    rng, more = random.Random(seed), ["run.workers=1", "--max-steps", steps]
    assert killing.run(work_on(tmp_path / "undisturbed", fashion_folder, *more), tmp_path / "undisturbed").code == 0
    output = tmp_path / "run"
    command = ["train.py", *map(str, COMMAND), *map(str, more), "--data", str(fashion_folder), "--output", str(output)]
    for _ in range(kills):
        before = steps_of(output)[-1:]
        process = Program(*command)
        wait_until(lambda before=before: steps_of(output)[-1:] != before, process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.2))  # all of them stay within the steps of a run
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"seed {seed}: {process.printed()}"
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert_equal(output, tmp_path / "undisturbed", steps)
