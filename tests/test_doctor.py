"""deit-kd doctor, alone and in two processes, well and not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, run_script


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


def test_alone(tmp_path: Path) -> None:
    done = run_script("-m", "deit_kd", "doctor", "quickstart", "--output", tmp_path / "runs")
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert list(lines) == ["versions", "devices", "processes", "all-reduce", "speed", "clock", "recipe", "data", "disk", "port"]
    assert done.returncode == max({"ok": 0, "warn": 1, "fail": 2}[line.split()[0]] for line in lines.values()) < 2, done.stdout
    assert "12,000 training and 2,000 validation images" in lines["data"]
    assert "a checkpoint of 6 MB is written in" in lines["disk"]
    assert not (tmp_path / "runs").exists()
    done = run_script("-m", "deit_kd", "doctor", "deit_ti", "--data", tmp_path / "nowhere", "--output", tmp_path)
    assert done.returncode == 2
    assert "fail  data" in done.stdout
    assert str(tmp_path / "nowhere") in done.stdout


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
