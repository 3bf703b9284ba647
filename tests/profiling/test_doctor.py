"""deit-kd doctor, alone and in two processes, well and not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from conftest import ROOT, SMALL
from deit_kd import recipe as recipes
from deit_kd.data.build import open_data
from deit_kd.profiling import machine
from deit_kd.profiling.doctor import run_checks, verdict
from deit_kd.tasks import ready
from programs import run_script


def doctor(command: str, **environment: str) -> tuple[int, dict[str, str]]:
    """Two processes, each of which runs a shell command that may look at RANK; (exit code, line of each check)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", "bash", "-c"]
    done = subprocess.run(
        [*launch, f"exec '{sys.executable}' -m deit_kd doctor {command}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0] in ("ok", "warn", "fail")]
    return done.returncode, {line.split()[1]: line for line in lines}


@pytest.mark.slow
def test_alone(tmp_path: Path) -> None:
    done = run_script("-m", "deit_kd", "doctor", "quickstart", "--output", tmp_path / "runs")
    *found, verdict = done.stdout.splitlines()
    lines = {line.split()[1]: line for line in found}
    process = ["versions", "devices", "processes", "all-reduce", "speed", "clock", "settings", "recipe"]
    machine = ["memory", "workers", "files", "locks", "flush", "umask", "disk", "port"]
    assert list(lines) == [*process, "data", "teacher", "batch", "networks", "output", *machine]
    assert "would end a run" in verdict or verdict == "all is well: a run would start"
    assert "quickstart_teacher: weights in the folder" in lines["teacher"]
    assert "license apache-2.0, 10 classes" in lines["teacher"]
    assert done.returncode == max({"ok": 0, "warn": 1, "fail": 2}[line.split()[0]] for line in lines.values()) < 2, done.stdout
    assert "12,000 training and 2,000 validation images" in lines["data"]
    assert "a checkpoint of 6 MB is written in" in lines["disk"]
    assert not (tmp_path / "runs").exists()
    done = run_script("-m", "deit_kd", "doctor", "deit_ti", "--data", tmp_path / "nowhere", "--output", tmp_path)
    assert done.returncode == 2
    assert "fail  data" in done.stdout
    assert str(tmp_path / "nowhere") in done.stdout
    assert "fail  teacher     regnety_160.deit_in1k: its weights are not in the hub's cache" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("a run would end because of: data, teacher")


def test_what_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = open_data(recipes.load("quickstart").data, None)

    def blank(_: Any) -> torch.Tensor:
        return torch.zeros(3, 28, 28)

    def hangs(_: Any) -> torch.Tensor:
        threading.Event().wait(3600)
        return blank(_)

    assert machine.workers(2, source, blank, 28, 40).severity == "ok"
    assert machine.workers(0, source, blank, 28, 40).severity == "ok"
    with monkeypatch.context() as patch:
        patch.setattr("deit_kd.data.workers.cannot_hand_over", lambda: "AF_UNIX path too long")
        line = machine.workers(2, source, blank, 28, 40)
        assert line.severity == "warn"
        assert "set TMPDIR to a short path" in line.text
        patch.setattr("deit_kd.profiling.machine.SECONDS", 1)
        line = machine.workers(2, source, hangs, 28, 40)
        assert line.severity == "fail"
        assert not any(process.is_alive() for process in multiprocessing.active_children()), "the one that hangs is ended"
        assert "gave no batch of 40 images in 1 s; run.workers=0" in line.text
    loader = ready.make_loaders(
        recipes.load("quickstart", ["run.workers=2"]), Accelerator(cpu=True), (source, source), None, print
    ).train
    told = {}
    for free in (10**9, loader.shared_bytes(), loader.shared_bytes() - 1):
        monkeypatch.setattr("deit_kd.profiling.machine.shared_memory_free", lambda free=free: free)
        told[free] = machine.shared_memory(loader, 1)
    assert [line.severity for line in told.values()] == ["ok", "ok", "warn"]
    assert "they come through pipes, which is slower" in list(told.values())[-1].text
    monkeypatch.setattr("resource.getrlimit", lambda _: (150, 150))
    assert machine.descriptors(2, 1).severity == "fail"
    monkeypatch.setattr("resource.getrlimit", lambda _: (200, 4096))
    assert "ulimit -n 4096" in machine.descriptors(2, 1).text
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert machine.descriptors(2, 1).severity == "ok"


def test_what_a_disk_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [machine.disk_operation(name, tmp_path).severity for name in ("locks", "flush", "umask")] == ["ok"] * 3

    def refuse(code: int, folders_only: bool = False) -> Callable[..., None]:
        def call(descriptor: Any, *_: Any) -> None:
            if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))

        return call

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse(errno.ENOLCK))
        line = machine.disk_operation("locks", tmp_path)
        assert line.severity == "warn"
        assert "this disk has no locks" in line.text
        patch.setattr("fcntl.flock", lambda *_: None)
        assert "gives a lock twice" in machine.disk_operation("locks", tmp_path).text
        patch.setattr("os.fsync", refuse(errno.EINVAL, folders_only=True))
        line = machine.disk_operation("flush", tmp_path)
        assert line.severity == "warn"
        assert "cannot flush folders (Invalid argument)" in line.text
        patch.setattr("os.fsync", refuse(errno.EIO))
        assert machine.disk_operation("flush", tmp_path).severity == "fail"
    before = os.umask(0o077)
    try:
        assert "mode 600" in machine.disk_operation("umask", tmp_path).text
        os.umask(0o277)
        assert machine.disk_operation("umask", tmp_path).severity == "fail"
    finally:
        os.umask(before)
    assert "cannot be written to" in machine.disk_operation("locks", tmp_path / "nowhere").text


@pytest.mark.slow
def test_a_precision_that_is_not_there_is_a_line() -> None:
    done = run_script("-m", "deit_kd", "doctor", "quickstart", "run.precision=fp16", "--device", "cpu")
    assert done.returncode == 2
    assert "fail  settings    run.precision=fp16: a CPU has no fp16 training" in done.stdout
    assert "ok    teacher" in done.stdout


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    code, lines = doctor(f"quickstart --device cpu --output '{tmp_path}'", ACCELERATE_USE_CPU="1")
    assert {name for name, line in lines.items() if line.startswith("fail")} == set()
    assert "0: CPU" in lines["devices"]
    assert "1: CPU" in lines["devices"]
    assert "sum right" in lines["all-reduce"]
    assert "every process reaches" in lines["port"]
    code, lines = doctor(f"quickstart epochs=$((10 + RANK)) --device cpu --output '{tmp_path}'", ACCELERATE_USE_CPU="1")
    assert code != 0
    assert lines["recipe"].startswith("fail")
    assert "process 1 has another recipe than process 0" in lines["recipe"]


def test_a_process_whose_launcher_is_missing() -> None:
    done = run_script("-m", "deit_kd", "doctor", "quickstart", env={**os.environ, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"})
    assert done.returncode == 2
    assert "error: processes do not find each other" in done.stderr
    assert "Traceback" not in done.stderr


def test_warnings_are_lines_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], fashion_folder: Path) -> None:
    """What the builders of data and networks print elsewhere is a warning here, and nothing goes past the lines."""
    shutil.copytree(fashion_folder, tmp_path / "data")
    for split in ("train", "val"):
        for number, folder in enumerate(sorted((tmp_path / "data" / split).iterdir())):
            folder.rename(folder.with_name(str(number + 5)))  # 10 before 5, as text
        (tmp_path / "data" / split / "5" / "notes.txt").touch()
    overrides = [*SMALL, "teacher.name=vit_tiny_patch16_224", "teacher.weights=random", "teacher.img_size=224"]
    recipe = recipes.load("quickstart", overrides)
    lines = list(run_checks(recipe, tmp_path / "data", tmp_path / "run", Accelerator(cpu=True)))
    assert [line for line in lines if line.severity == "fail"] == []
    doubts = [line for line in lines if "does not name its classes" in line.text]
    assert [(line.severity, line.name, line.text.count("does not name")) for line in doubts] == [("warn", "teacher", 1)]
    assert [line.severity for line in lines if line.name == "data"] == ["warn"]
    assert "teacher" in verdict(lines)
    printed = capsys.readouterr()
    assert "warning:" not in printed.out + printed.err
    assert not (tmp_path / "run").exists()
