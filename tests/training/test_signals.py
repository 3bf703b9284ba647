"""What a signal asks for: `Stop` by itself, and whole runs that get one at each of their parts."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import killing
import train
from conftest import SMALL, wait_until
from deit_kd import export, plots
from deit_kd.data import loader
from deit_kd.errors import UserError
from deit_kd.models import build
from deit_kd.tasks.classification import Classification
from deit_kd.training import checkpoint, loop
from deit_kd.training import metrics as tracking
from deit_kd.training.signals import Stop, Stopped


def signalled(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def fail(error: Exception) -> NoReturn:
    raise error


def wait_in(stop: Stop, work: Callable[[], Any]) -> None:
    with stop.interruptible():
        work()


def forever() -> NoReturn:
    while True:
        time.sleep(600)


def test_a_signal_of_a_loading_process_is_not_the_runs(tmp_path: Path) -> None:
    def work() -> None:
        with Stop() as stop:
            if os.fork() == 0:
                signalled(signal.SIGTERM)
                os._exit(0)
            os.wait()
            signalled(signal.SIGUSR1)
            wait_until(lambda: stop._first)
            assert stop._first
            print(stop.requested)

    assert killing.run(work, tmp_path).printed == "True\n"


def test_signals_of_one_moment_are_one_request_and_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    with Stop() as stop:
        assert not stop.requested
        stop._hear(signal.SIGWINCH, 100.0)
        assert not stop.requested
        stop._hear(signal.SIGUSR1, 100.0)
        stop._hear(signal.SIGTERM, 100.9)
        stop._hear(0, 900.0)
        assert stop.requested
        with pytest.raises(SystemExit) as end:
            stop._hear(signal.SIGTERM, 101.1)
    assert end.value.code == 128 + signal.SIGTERM


def test_a_process_that_waits_for_another_ends_at_the_second_signal_too(tmp_path: Path) -> None:
    def work() -> None:
        with Stop() as stop:

            def twice() -> None:
                signalled(signal.SIGTERM)
                wait_until(lambda: stop._first)
                stop.TOGETHER = 0.0
                signalled(signal.SIGTERM)

            threading.Thread(target=twice).start()
            read, _ = os.pipe()
            libc = ctypes.CDLL(None)
            while True:  # in C until something comes, as in a collective whose peer hangs; interrupted calls are taken up again
                libc.read(read, ctypes.create_string_buffer(1), 1)

    assert killing.run(work, tmp_path).code == 128 + signal.SIGTERM


@pytest.mark.parametrize("before", [True, False])
def test_a_wait_ends_at_once_where_nobody_else_waits(before: bool) -> None:
    with Stop(alone=True) as stop:
        if before:
            signalled(signal.SIGTERM)
        with pytest.raises(Stopped):
            wait_in(stop, lambda: (signalled(signal.SIGTERM), forever()))
    with Stop(alone=True) as stop, pytest.raises(Stopped) as stopped:
        wait_in(stop, lambda: fail(UserError("an image is broken")))
    with pytest.raises(UserError, match="an image is broken"):
        stopped.value.give_reason()


def test_where_others_wait_for_the_process_it_ends_for_another_start(tmp_path: Path) -> None:
    def work() -> None:
        with Stop(alone=False, grace=0.1) as stop, stop.interruptible():
            signalled(signal.SIGTERM)
            forever()

    ended = killing.run(work, tmp_path)
    assert ended.code == 75
    assert "stopped while it waited for data, and unsaved" in ended.printed


def test_a_sighup_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    def work(handler: Any) -> Callable[[], None]:
        def run() -> None:
            signal.signal(signal.SIGHUP, handler)
            train.listen()
            with Stop() as stop:
                signalled(signal.SIGHUP)
                assert stop.requested is (handler is signal.SIG_DFL)
            signalled(signal.SIGHUP)

        return run

    assert killing.run(work(signal.SIG_IGN), tmp_path).code == 0
    assert killing.run(work(signal.SIG_DFL), tmp_path).code == 75


RUN = [
    *("--recipe", "quickstart", *SMALL, "teacher.name=resnet10t", "teacher.weights=random", "--max-steps", "6"),
    *("run.save_every_steps=4", "run.log_every_steps=1", "run.eval_every_epochs=1", "global_batch_size=48", "ema_decay=0.9"),
]  # 5 steps an epoch: a step that is saved, an evaluation whose step is not


def session(
    data: Path, output: Path, moment: tuple[Any, str, int] | None, *numbers: int, do: Callable[[], None] | None = None
) -> killing.Ended:
    def work() -> None:
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        train.listen()
        if moment is not None:
            killing.at_call(*moment, do or (lambda: signalled(*numbers)))
        train.main([*RUN, "--data", str(data), "--output", str(output)])

    return killing.run(work, output)


@pytest.fixture(scope="module")
def undisturbed(fashion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = session(fashion_folder, output, None)
    assert ended.code == 0, ended.printed
    return (output / "student/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_signal_in_any_part_of_a_run_saves_it_and_asks_for_another_start(
    undisturbed: bytes, fashion_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    moments = [  # sessions of one run, one after the other: where the signal comes, and the step that is reached then
        ((build, "build_teachers", 1), 0),
        ((Classification, "evaluate_teachers", 1), 0),
        ((tracking.Tracker, "start", 1), 0),
        ((loader, "mix", 3), 2),  # in the making of the third batch
        ((loop, "_update", 1), 3),
        ((checkpoint, "save", 1), 4),
        ((Classification, "evaluate", 1), 5),
        ((Classification, "evaluate", 1), 5),  # which a session begins with, then
        ((export, "export_student", 1), 6),
        ((export, "write_card", 1), 6),
        ((plots, "plot_run", 1), 6),
    ]
    for moment, step in moments:
        ended = session(fashion_folder, output, moment, signal.SIGHUP, signal.SIGTERM)
        assert ended.code == 75, (moment, ended.printed)
        assert "Traceback" not in ended.printed, (moment, ended.printed)
        assert [path.name for path in sorted(output.glob("checkpoints/*"))][-1:] == ([f"step_{step:08d}"] if step else []), moment
    ended = session(fashion_folder, output, None)
    assert ended.code == 0, ended.printed
    assert (output / "student/model.safetensors").read_bytes() == undisturbed
    lines = [(line["kind"], line["step"]) for line in tracking.read_metrics(output) if line["kind"] in ("train", "eval")]
    assert sorted(lines) == [("eval", 5), ("eval", 6), *(("train", step) for step in range(1, 7))]


def test_a_fault_of_an_image_saves_what_was_reached(undisturbed: bytes, fashion_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ended = session(fashion_folder, output, (loader.TrainLoader, "_finished", 3), do=lambda: fail(UserError("the disk is gone")))
    assert ended.code == 2, ended.printed
    assert "error: the disk is gone" in ended.printed
    assert (output / "checkpoints/step_00000002").is_dir()
    assert session(fashion_folder, output, None).code == 0
    assert (output / "student/model.safetensors").read_bytes() == undisturbed
