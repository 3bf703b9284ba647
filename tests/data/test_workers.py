"""Loading processes that die, hang, raise, cannot start, or have no shared memory; and those that are spawned."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import deit_kd.training.loop  # noqa: F401  # here once, instead of in each child
import killing
import train
from conftest import SMALL
from deit_kd import recipe as recipes
from deit_kd.data import EvaluationLoader, LoaderConfig, TrainLoader, open_source, workers
from deit_kd.data.build import loader_config
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.data.sources.folder_source import FolderSource
from deit_kd.data.transforms import evaluation_transform
from deit_kd.errors import UserError
from deit_kd.tasks import setup
from programs import run_script
from sections import evaluating

CPU = torch.device("cpu")


def train_loader(folder: Path, number: int, say: Callable[[str], None] = print, patience: float = 60.0, *more: str) -> TrainLoader:
    """Batches of 120 images [3,63,63] in three of 1.9 MB, which come through shared memory."""
    recipe = recipes.load("quickstart", ["augmentation.random_erasing=0.5", "data.img_size=63", *more])
    here = LoaderConfig(CPU, 1, 0, number, recipe.data.on_bad_image, say, patience)
    sizes = {"num_classes": 10, "seed": 5, "global_batch_size": 120, "accumulation_steps": 3}
    return TrainLoader(
        open_source("image_folder", folder, "train"),
        choose_augmentation(recipe.data, recipe.augmentation, recipe.run, CPU),
        recipe.augmentation,
        here,
        **sizes,
    )


def stream(loader: TrainLoader, epochs: int = 2) -> list[str]:
    return [hashlib.sha1(batch.images.numpy()).hexdigest() for epoch in range(epochs) for batch in loader.epoch(epoch)]


@pytest.fixture(scope="module")
def expected(fashion_folder: Path) -> list[str]:
    return stream(train_loader(fashion_folder, 0))


class Odd(FolderSource):
    """Does something odd, as a loading process, with one image, as long as there is a file."""

    do: Callable[[], Any]
    file: Path
    index = 77

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.index and self.file.exists() and torch.utils.data.get_worker_info() is not None:
            self.do()
        return super().__getitem__(index)


def make_odd(made: TrainLoader | EvaluationLoader, file: Path, do: Callable[[], Any], index: int = 77) -> None:
    file.touch()
    source: Any = made.source
    source.__class__ = Odd
    source.file, source.do, source.index = file, do, index


def once(file: Path, do: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (file.unlink(), do())


def kill_it() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash_it() -> None:
    ctypes.string_at(0)


def leave_it() -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("do", [kill_it, crash_it, leave_it])
@pytest.mark.slow
def test_a_loading_process_that_dies_is_replaced(
    do: Callable[[], Any], expected: list[str], fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(workers, "warn", warned.append)
    before, made, file = signal.getsignal(signal.SIGCHLD), train_loader(fashion_folder, 2), tmp_path / "once"
    make_odd(made, file, once(file, do))
    assert stream(made) == expected
    assert len(warned) == 1
    assert warned[0].startswith("a loading process died")
    assert "others take its place" in warned[0]
    assert signal.getsignal(signal.SIGCHLD) == before, "torch's handler would raise in the middle of a save"


@pytest.mark.slow
def test_one_that_dies_again_and_again_ends_the_program_by_name(fashion_folder: Path, tmp_path: Path) -> None:
    """In evaluation."""
    source = open_source("image_folder", fashion_folder, "val")
    made = EvaluationLoader(
        source,
        evaluation_transform(*evaluating(recipes.load("quickstart"))),
        LoaderConfig(CPU, 1, 0, 1, "refuse", print),
        batch_size=10,
    )
    make_odd(made, tmp_path / "always", kill_it, 25)
    batches = iter(made)
    assert [len(next(batches)[1]), len(next(batches)[1])] == [10, 10]
    with pytest.raises(UserError, match=r"died 3 times at the same batch \(.*png and the 9 other images") as told:
        next(batches)
    assert source.where(20) in str(told.value)


class PeculiarError(Exception):
    def __init__(self, one: int, two: int):
        super().__init__("is\npeculiar")


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_transform_cannot_take_is_a_fault_of_the_image(
    number: int, fashion_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train_loader(fashion_folder, number)

    def refuses(_: Image.Image) -> None:
        raise PeculiarError(1, 2)

    made._dataset.transform = refuses  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"png: cannot be read \(is peculiar\)"):
        next(made.epoch(0))


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_that_does_not_come_is_told(
    number: int, expected: list[str], fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image hangs until a line says that the program waits for it."""
    read, write = os.pipe()
    told: list[str] = []

    def warn(text: str) -> None:
        told.append(text)
        if text.startswith("waits for"):
            os.write(write, b"x")

    monkeypatch.setattr(workers, "warn", warn)
    monkeypatch.setattr(workers, "_watch", workers._Watch())
    made, (file, get) = train_loader(fashion_folder, number, patience=0.3), (tmp_path / "once", FolderSource.__getitem__)
    file.touch()

    def hangs(source: FolderSource, index: int) -> tuple[Image.Image, int]:
        if index == 77 and file.exists():
            file.unlink()
            os.read(read, 1)
        return get(source, index)

    monkeypatch.setattr(FolderSource, "__getitem__", hangs)
    assert stream(made) == expected
    assert any("and the 39 other images of its batch since" in text for text in told)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.slow
def test_a_run_that_waits_for_data_without_end_is_saved_and_stopped(number: int, fashion_folder: Path, tmp_path: Path) -> None:
    """A process that is stopped hears no SIGTERM either."""
    output, get, seen = tmp_path / "run", FolderSource.__getitem__, [0]

    def hangs(source: FolderSource, index: int) -> tuple[Image.Image, int]:
        if "train" in source.origin:
            seen[0] += 1
            if seen[0] == 60 and number:
                os.kill(os.getpid(), signal.SIGSTOP)
            elif seen[0] == 60:
                os.read(os.pipe()[0], 1)
        return get(source, index)

    def work() -> None:
        FolderSource.__getitem__ = hangs  # type: ignore[method-assign]
        placed = setup.loader_config
        setup.loader_config = lambda *options: replace(placed(*options), patience=0.1)
        options = ["--recipe", "quickstart", "--data", str(fashion_folder), "--output", str(output), "--max-steps", "6", *SMALL]
        train.main([*options, "teacher.name=resnet10t", "teacher.weights=random", f"run.workers={number}"])

    ended = killing.run(work, output)
    assert ended.code == 75, ended.printed
    assert "waits for" in ended.printed
    assert "the run is asked to stop" in ended.printed
    (saved,) = (int(path.name.removeprefix("step_")) for path in output.glob("checkpoints/step_*"))
    assert saved == 2 or (number and saved == 1), "a process that is stopped may hold the batch before it too"
    assert f"stopped at step {saved}; the same command goes on" in ended.printed


def test_a_folder_too_long_for_sockets(
    expected: list[str], fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    monkeypatch.delitem(
        multiprocessing.current_process()._config, "tempdir", raising=False
    )  # where sockets are, once there was one
    for folder, reason in ((long, "AF_UNIX path too long"), (tmp_path / "is not there", "No such file or directory")):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert stream(train_loader(fashion_folder, 2, said.append)) == expected
        assert f"descriptors cannot be handed over ({reason}" in said[-1].replace("[Errno 2] ", "")
        assert "batches come through pipes, which is slower" in said[-1]


@pytest.mark.parametrize(
    ("on", "options", "told"),
    [
        ("cpu", "size=64k", "has no room for a batch"),  # for none
        ("cpu", "size=4m", "has no room for a batch"),  # for two
        ("device", "size=1m", "has no room for a batch"),
        ("cpu", "nr_inodes=1", "loading processes cannot start"),  # not for the semaphores of a queue
    ],
)
def test_little_shared_memory(on: str, options: str, told: str, fashion_folder: Path, tmp_path: Path) -> None:
    here = f"run.augment_on={on}"

    def work() -> None:
        said: list[str] = []
        killing.mount(Path("/dev/shm"), options)
        alone = stream(train_loader(fashion_folder, 0, said.append, 60.0, here))
        assert not said
        assert stream(train_loader(fashion_folder, 2, said.append, 60.0, here)) == alone
        assert len(said) == 1
        print(*said)

    ended = killing.run(work, tmp_path)
    assert ended.code == 0, ended.printed
    assert told in ended.printed
    assert ("--shm-size=8g" if "size" in options else "run.workers=0") in ended.printed


AUGMENTATIONS = [
    [],
    ["augmentation.auto_augment=rand-m9-mstd0.5-inc1", "augmentation.random_erasing=0.5"],
    ["augmentation.auto_augment=original"],
    ["augmentation.auto_augment=v0"],
    ["augmentation.auto_augment=3a", "augmentation.color_jitter=0.3"],
    ["augmentation.crop_scale=null", "augmentation.crop_padding=4"],
    ["augmentation.interpolation=random"],
]


def values(batch: Any) -> Any:
    return workers._each_tensor(batch, lambda tensor: tensor.tolist())


@pytest.mark.parametrize("overrides", AUGMENTATIONS, ids=str)
@pytest.mark.parametrize("on", ["cpu", "device"])
def test_all_that_a_loading_process_needs_can_be_sent_to_it(overrides: list[str], on: str, fashion_folder: Path) -> None:
    made = train_loader(fashion_folder, 0, print, 60.0, f"run.augment_on={on}", *overrides)
    evaluation = EvaluationLoader(
        made.source,
        evaluation_transform(*evaluating(recipes.load("quickstart", overrides))),
        LoaderConfig(CPU, 1, 0, 0, "refuse", print),
        10,
    )
    for batches, keys in ((made._batches, [(0, made._order(0)[:40])]), (evaluation._batches, evaluation._keys[:1])):
        dataset, collate, begin = pickle.loads(
            pickle.dumps((batches._make.args[0], batches._make.keywords["collate_fn"], workers._begin))
        )
        assert begin is workers._begin
        there, _ = collate(dataset.__getitems__(keys[0]))
        assert values(there) == values(next(batches(keys)))


@pytest.mark.slow
def test_spawned_processes_give_the_same_stream(expected: list[str], fashion_folder: Path) -> None:
    script = (
        "import sys, multiprocessing; multiprocessing.set_start_method('spawn'); sys.path[:0] = ['tests', 'tests/data']; "
        "from pathlib import Path; from test_workers import *; print(*stream(train_loader(Path(sys.argv[1]), 1)))"
    )
    done = run_script("-c", script, fashion_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_a_loader_that_is_forgotten_ends_its_processes_at_once(fashion_folder: Path) -> None:
    """Killed; torch terminates them when the garbage collector finds a circle, after it waited five seconds for each."""
    gc.collect()
    before = set(multiprocessing.active_children())
    circle: list[Any] = [train_loader(fashion_folder, 2)]
    circle.append(circle)
    next(circle[0].epoch(0))
    processes = set(multiprocessing.active_children()) - before
    assert len(processes) == 2
    del circle
    gc.collect()
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}


def test_what_doctor_asks(fashion_folder: Path) -> None:
    assert train_loader(fashion_folder, 2).shared_bytes() == 5 * 40 * 3 * 63 * 63 * 4
    assert (workers.shared_memory_free() or 0) > 0
    assert workers.cannot_hand_over() is None


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),
        (EOFError(), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (FileNotFoundError(2, "No such file or directory"), True),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
        (OSError(24, "Too many open files"), False),
        (ValueError("something else"), False),
    ],
    ids=str,
)
def test_what_tells_of_a_death(error: Exception, died: bool) -> None:
    assert workers._tells_of_a_death(error) is died


def test_cores_are_those_of_affinity_and_of_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(workers, "CGROUPS", tmp_path)
    assert workers.cores() == 12
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert workers.cores() == 12
    (tmp_path / "cpu.max").write_text("550000 100000\n")
    assert workers.cores() == 5
    (tmp_path / "cpu.max").write_text("5000 100000\n")
    assert workers.cores() == 1


def test_processes_of_one_machine_share_its_cores(fashion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 processes 8 are here."""
    recipe = recipes.load("quickstart")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    accelerator = SimpleNamespace(device=CPU, num_processes=64, process_index=0)
    assert loader_config(recipe.data, recipe.run, accelerator, print).workers == 8  # type: ignore[arg-type]
