"""Real images and small recipes that the tests share."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # small models; two test processes share two cores
os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a test that would need the network fails at once instead of waiting for it

import importlib.util
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image
from timm.data import ImageNetInfo

from deit_kd.files import imports
from deit_kd.recipe.objectives import FEATURE_OBJECTIVES, LOGIT_OBJECTIVES, PROJECTORS
from programs import ROOT, Program

MINUTES = 900  # seconds after which a test that hangs ends; no right run comes near it, however loaded the machine is
sys.path.insert(0, str(ROOT))
# Autograd looks for devices at its first backward. What some tests load (exporters, compilers) then counts as one, and autograd starts
# threads, after which no forked child can train. So the first backward is here.
torch.ones(1, requires_grad=True).sum().backward()

# What turns the quick start into a run of seconds, on a folder of 240 real images: 10 steps an epoch.
SMALL = [
    "data.source=image_folder",
    "global_batch_size=24",
    "epochs=3",
    "run.workers=0",
    "run.log_every_steps=4",
    "optim.warmup_epochs=1",
    "student.model_args.embed_dim=48",
    "student.model_args.depth=2",
]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in the process; a second run in one process starts clean."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pictures() -> None:
    """Pictures of runs in this process are rendered. Of tests that do not ask for it they are blank: that halves a short run's time."""


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: Image.new("RGB", (8, 8)).save(file, "png"))


@pytest.fixture(scope="session")
def fashion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with a folder a class: 24 and 4 PNGs of each class of Fashion-MNIST."""
    from deit_kd.data.sources.catalog import EMBEDDED, FASHION_CLASSES

    root = tmp_path_factory.mktemp("fashion folder")  # the space is on purpose
    with np.load(EMBEDDED) as arrays:
        for split, count in (("train", 24), ("val", 4)):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            for label, name in enumerate(FASHION_CLASSES):
                folder = root / split / f"{label} {name.replace('/', ' or ')}"
                folder.mkdir(parents=True)
                for index in np.flatnonzero(labels == label)[:count]:
                    Image.fromarray(images[index]).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def photos() -> list[tuple[Path, int]]:
    """foolbox's 20 ImageNet photos with their class indices."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    files = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    return [(file, int(file.stem.split("_")[-1])) for file in files]


@pytest.fixture(scope="session")
def photo_folder(photos: list[tuple[Path, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 20 photos as a part of ImageNet: folders named by synset, the same for train and val."""
    root, synsets = tmp_path_factory.mktemp("photos"), ImageNetInfo("imagenet-1k").label_names()
    for split in ("train", "val"):
        for file, label in photos:
            (root / split / synsets[label]).mkdir(parents=True, exist_ok=True)
            (root / split / synsets[label] / file.name).symlink_to(file)
    return root


@pytest.fixture
def train_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs train.py's main in this process; gives (exit code, everything it printed)."""
    import train

    def run(*arguments: object) -> tuple[int, str]:
        code = 0
        try:
            train.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        AcceleratorState._reset_state(reset_partial_state=True)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@dataclass
class FakeClock:
    """In place of time.perf_counter: a reading takes a millisecond and nothing else does, unless a test says how long."""

    now: float = 0.0

    def read(self) -> float:
        self.now += 0.001
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    return clock


@pytest.fixture
def processor_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """time.perf_counter gives this thread's seconds on a processor, which other processes of the machine do not change."""
    monkeypatch.setattr(time, "perf_counter", time.thread_time)


@pytest.fixture
def forgets() -> Iterator[None]:
    """What a test registers is forgotten after it, with the file that it is recorded by."""
    everything: list[dict[Any, Any]] = [LOGIT_OBJECTIVES, FEATURE_OBJECTIVES, PROJECTORS, imports.hashes]
    before = [dict(rows) for rows in everything]
    yield
    for rows, kept in zip(everything, before, strict=True):
        rows.clear()
        rows.update(kept)


@contextmanager
def python_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Counts calls of Python functions on this thread, by file and name."""
    counted: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            counted[frame.f_code.co_filename, frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        yield counted
    finally:
        sys.setprofile(None)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[Any] | Program | None = None) -> None:
    """Waits with pauses, which leave the processor to the process that is waited for, until the condition holds.

    Raises:
        AssertionError: the process ends before, or nothing happens for many minutes.
    """
    for _ in range(MINUTES * 20):
        if condition():
            return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.05)
    if not condition():
        if process is not None:
            process.kill()
        raise AssertionError(process and (process.returncode, *process.communicate()))
