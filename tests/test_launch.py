"""What is in launch/, started for real: two processes, signals through the launcher, a process that dies, and Slurm's script."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import MINUTES, ROOT, SMALL, wait_until
from deit_kd.training.metrics import read_metrics
from programs import run_script

pytestmark = pytest.mark.slow

RUN = [
    *("--device", "cpu", "--recipe", "quickstart", *SMALL, "teacher.name=resnet10t", "teacher.weights=random"),
    *("epochs=500", "run.eval_every_epochs=500", "run.save_every_steps=4", "run.log_every_steps=1"),
]


def torchrun(output: Path, data: Path, *more: object, **environment: str) -> subprocess.Popen[str]:
    command = ["bash", "launch/torchrun.sh", *RUN, "--data", data, "--output", output, *more]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "NPROC": "2", "PYTHON": sys.executable, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_a_checkpoint(output: Path, process: subprocess.Popen[str]) -> None:
    wait_until(lambda: list(output.glob("checkpoints/step_*")), process)


def kill(output: Path, variable: bytes) -> None:
    """kill -9 of the run's processes, launcher and training, that have the variable in their environment."""
    listed = subprocess.run(["pgrep", "-f", f"train.py.*--output {output}"], capture_output=True, text=True, check=True)
    found = [int(number) for number in listed.stdout.split() if variable in Path(f"/proc/{number}/environ").read_bytes()]
    assert found
    for number in found:
        os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda file: file.name)
def test_files_are_what_their_readers_take(file: Path) -> None:
    documents = list(yaml.safe_load_all(file.read_text()))
    if "compute_environment" not in documents[0]:
        assert documents[-1]["kind"] in ("Job", "JobSet")
        assert "launch/torchrun.sh" in file.read_text()
        return
    config = load_config_from_file(str(file))
    assert config.num_processes == {"cpu1": 1, "cpu2": 2, "gpu1": 1, "ddp8": 8, "fsdp2": 8, "two_nodes": 16}[file.stem]


def test_a_student_cut_over_two_processes_is_exported_as_from_ddp(tmp_path: Path, fashion_folder: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--config_file"]
    options = [*RUN, "--data", fashion_folder, "--max-steps", 4, "run.eval_every_epochs=1", "ema_decay=0.5", "optim.clip_grad=1.0"]
    options += ["run.keep_best=true"]  # what is exported is gathered when it is evaluated
    options += ["run.speed=plain"]  # a bound of rounding: Adam steps by the rate also where a gradient is nothing but rounding
    students = {}
    for name, file in (("DDP", "cpu2"), ("FSDP2", "fsdp2")):
        done = run_script(*launcher, f"launch/{file}.yaml", "train.py", *options, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert (run["sharded"], run["processes"]) == (name == "FSDP2", 2)
        assert "24 = 2 x 1 x 12 images" in done.stdout
        assert {line["images"] for line in read_metrics(tmp_path / name) if line["kind"] == "eval"} == {40}
        students[name] = load_file(tmp_path / name / "student/model.safetensors")
    assert students["DDP"].keys() == students["FSDP2"].keys()
    for key, value in students["DDP"].items():
        assert_close(students["FSDP2"][key], value, rtol=1e-5, atol=1e-6)
        assert_close(load_file(tmp_path / "FSDP2/checkpoints/step_00000004/ema.safetensors")[key], students["FSDP2"][key])
    ours, theirs = ([line for line in read_metrics(tmp_path / name) if line["kind"] == "eval"][-1] for name in students)
    assert (ours["top1"], ours["ema_top1"]) == (theirs["top1"], theirs["ema_top1"])


def test_a_signal_to_the_launcher_saves_and_asks_for_another_start(tmp_path: Path, fashion_folder: Path) -> None:
    output = tmp_path / "run"
    process = torchrun(output, fashion_folder)
    wait_for_a_checkpoint(output, process)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=MINUTES)
    assert process.returncode == 75, said
    reached = max(int(path.name.removeprefix("step_")) for path in output.glob("checkpoints/step_*"))
    assert f"stopped at step {reached}; the same command goes on" in said
    again = torchrun(output, fashion_folder, "--max-steps", reached + 1)
    said, _ = again.communicate(timeout=MINUTES)
    assert again.returncode == 0, said
    assert f"going on from {output}/checkpoints/step_{reached:08d}" in said


def test_a_process_that_dies_takes_the_run_down_and_back(tmp_path: Path, fashion_folder: Path) -> None:
    output = tmp_path / "run"
    process = torchrun(output, fashion_folder, "--max-steps", 40, MAX_RESTARTS="2")
    wait_for_a_checkpoint(output, process)
    kill(output, b"LOCAL_RANK=1\0")
    said, _ = process.communicate(timeout=MINUTES)
    assert process.returncode == 0, said
    assert "going on from" in said
    assert (output / "student/model.safetensors").exists()


def test_two_machines_lose_one_and_get_it_back(tmp_path: Path, fashion_folder: Path) -> None:
    """Two launchers on the loopback device; the second dies with its training process, and is started again."""
    output = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"NNODES": "2", "HEAD": "127.0.0.1", "PORT": port, "LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NPROC": "1"}

    def start(rank: int) -> subprocess.Popen[str]:
        return torchrun(output, fashion_folder, "--max-steps", 60, NODE_RANK=str(rank), MAX_RESTARTS="2", **here)

    first, second = start(0), start(1)
    wait_for_a_checkpoint(output, first)
    kill(output, b"NODE_RANK=1\0")
    second.communicate(timeout=MINUTES)
    third = start(1)
    said, _ = first.communicate(timeout=MINUTES)
    assert (first.returncode, third.wait(timeout=MINUTES)) == (0, 0), said
    assert "24 = 2 x 1 x 12 images" in said
    assert "going on from" in said
    assert (output / "student/model.safetensors").exists()


def test_slurms_script_hands_over_rank_port_and_arguments(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands that tell what they were called with; the step ends as one that a signal stopped."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "scontrol": 'case "$1" in show) printf "node7\\nnode8\\n";; *) echo "scontrol $*" >> "$LOG";; esac',
        # runs the command on "the second node", where another launch/torchrun.sh tells what it gets
        "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/torchrun.sh").write_text(
        'echo "rank $NODE_RANK of $NNODES at $HEAD:$PORT, $MAX_RESTARTS: $*" >> "$LOG"; exit 75\n'
    )
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "LOG": str(log),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "41234",
    }
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm.sh", "--recipe", "deit_ti", "--data", "a folder"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == [
        "rank 1 of 2 at node7:21234, 3: --recipe deit_ti --data a folder",
        "scontrol requeue 41234",
    ]
