"""Files of a run folder, changed in every way: going on from them succeeds or ends in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

import train
from deit_kd import recipe as recipes
from deit_kd.export import write_card
from deit_kd.training import checkpoint, resume, run_start
from deit_kd.training.metrics import Tracker
from deit_kd.training.state import RunState
from fuzzing import bounded, changed, damaged, json_bytes, survives
from runs import command, make_data

FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "student/config.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = make_data(folder / "data")
    train.main(command(data, folder / "run", "--max-steps", 2))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunState]:
    """(a checkpoint, what it is put back into) of a network of one layer with all that a state.json may hold."""
    folder = tmp_path_factory.mktemp("small") / "run"
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    folder.mkdir()
    state = RunState(
        module=module,
        optimizer=optimizer,
        ema=None,
        tracker=Tracker(accelerator, folder, 10),
        accelerator=accelerator,
        folder=folder / "checkpoints",
        steps_per_epoch=4,
        recipe="x",
        layout={"processes": 1},
        depends_on={"optim.lr": 0.1, "classes": ["a", "b"], resume.TRAINING: {"number": 3, "labels": "x", "sizes": None}},
        keep_checkpoints=1,
        on_full_disk="stop",
    )
    step(state)
    state.tracker.log("train", 1, {"loss": 1.0})
    state.tracker.add({"loss": torch.tensor(1.0)})
    state.save(2)
    return folder / "checkpoints/step_00000002", state


def step(state: RunState) -> None:
    state.optimizer.zero_grad()
    state.module(torch.ones(4, 3)).sum().backward()
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1 * group.get("lr_scale", 1.0)
    state.optimizer.step()


def go_on(path: Path, state: RunState) -> None:
    """What a resumed run does with a checkpoint."""
    content = checkpoint.verify(path)
    found = resume.changes(content.get("depends_on", {}), state.depends_on)
    resume.refuse("other", found, (), ())
    state.tracker.start(state.restore(path))
    state.tracker.means()
    step(state)


def test_state_json(small: tuple[Path, RunState], tmp_path: Path) -> None:
    path, state = small
    right = json.loads((path / "state.json").read_text())
    go_on(path, state)
    own = Path(shutil.copytree(path, tmp_path / "step_00000002"))

    @bounded
    @given(st.one_of(json_bytes(right), changed({k: v for k, v in right.items() if k != "own_sha256"})))
    def fuzz(content: Any) -> None:
        if isinstance(content, dict):  # forged: its hash is right
            content = json.dumps({**content, "own_sha256": checkpoint._own_hash(content)}).encode("utf-8", "surrogatepass")
        (own / "state.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        survives(lambda: go_on(own, state))

    fuzz()


@pytest.mark.parametrize("name", ["module", "optimizer"])
def test_safetensors_of_a_checkpoint(name: str, small: tuple[Path, RunState], tmp_path: Path) -> None:
    path, state = small
    right = (path / f"{name}.safetensors").read_bytes()
    own = Path(shutil.copytree(path, tmp_path / "step_00000002"))

    @bounded
    @given(damaged(right), st.booleans())
    def fuzz(content: bytes, forged: bool) -> None:
        (own / f"{name}.safetensors").write_bytes(content)
        if forged:
            head = json.loads((path / "state.json").read_text())
            del head["own_sha256"]
            head["sha256"][f"{name}.safetensors"] = checkpoint.sha256(own / f"{name}.safetensors")
            (own / "state.json").write_text(json.dumps({**head, "own_sha256": checkpoint._own_hash(head)}))
        survives(lambda: go_on(own, state))

    fuzz()


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "recipe.yaml"])
def test_small_files(name: str, run: Path, tmp_path: Path) -> None:
    """A start in the folder, and a card of it."""
    own = Path(shutil.copytree(run, tmp_path / "run"))
    right = (run / name).read_bytes()
    recipe = recipes.load(run / "recipe.yaml")
    lines = right.splitlines()

    def of_lines() -> st.SearchStrategy[bytes]:
        one = st.sampled_from(range(len(lines))).flatmap(
            lambda at: json_bytes(json.loads(lines[at])).map(lambda line: b"\n".join([*lines[:at], line, *lines[at + 1 :]]) + b"\n")
        )
        return st.one_of(one, damaged(right))

    given_bytes = {
        "run.json": lambda: json_bytes(json.loads(right)),
        "metrics.jsonl": of_lines,
        "recipe.yaml": lambda: damaged(right),
    }

    @bounded
    @given(given_bytes[name]())
    def fuzz(content: bytes) -> None:
        (own / name).write_bytes(content)
        survives(lambda: run_start._find(own, recipe, "auto", (), lambda text: None))
        if name != "recipe.yaml":  # whose faults are a line each
            survives(lambda: write_card(own))

    fuzz()
