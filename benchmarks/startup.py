"""Seconds from a command to its answer: help, and the first step of the quick start, each in fresh processes.

    python benchmarks/startup.py            # five of each, in turn
    python benchmarks/startup.py --quick    # two

Beside `import torch, timm`, without which nothing can train. Wall seconds and processor seconds of the whole process (Linux). The first step is
there when its log line is: before it the data are opened, the teacher read and evaluated, and workers started. Writes results/speed_startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tqdm import tqdm

from deit_kd.training.run_folder import commit, hardware

HELP = {
    "import torch, timm": ["-c", "import torch, timm"],
    "train.py --help": ["train.py", "--help"],
    "deit-kd --help": ["-m", "deit_kd", "--help"],
    "train.py with a typo": ["train.py", "--recipe", "quickstart", "optim.rl=1"],
    "deit-kd plan --help": ["-m", "deit_kd", "plan", "--help"],
}
FIRST_STEP = ["train.py", "--recipe", "quickstart", "--max-steps", "1", "--device", "cpu", "run.log_every_steps=1"]


def whole(arguments: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of a process and of what it started."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def first_lines(folder: Path) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds until train.py says that the teacher is evaluated, and that a step is done; the process runs to its end."""
    started, found = time.perf_counter(), {}
    command = [sys.executable, *FIRST_STEP, "--output", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        for kind, name in (("teacher", "quickstart, teacher evaluated"), ("train", "quickstart, first step")):
            if line.startswith(kind) and "step" in line:
                found[name] = time.perf_counter() - started, _processor_seconds(process.pid)
    if process.wait() != 0:
        raise SystemExit(f"train.py ended with {process.returncode}")
    return found


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "speed_startup.json")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    times: dict[str, list[tuple[float, float]]] = {}
    for number in tqdm(range(rounds + 1), unit="round"):  # the first reads files that the others find in memory
        each = {name: whole(arguments) for name, arguments in HELP.items()}
        with tempfile.TemporaryDirectory() as folder:
            each |= first_lines(Path(folder) / "run")
        for name, seconds in each.items() if number else ():
            times.setdefault(name, []).append(seconds)
    rows = {
        name: {
            "wall": median(wall for wall, _ in seconds),
            "wall_min": min(wall for wall, _ in seconds),
            "processor": median(cpu for _, cpu in seconds),
            "processor_min": min(cpu for _, cpu in seconds),
        }
        for name, seconds in times.items()
    }
    print(f"{'seconds':<32}{'wall':>8}{'least':>8}{'processor':>11}{'least':>8}")
    for name, row in rows.items():
        print(f"{name:<32}{row['wall']:>8.2f}{row['wall_min']:>8.2f}{row['processor']:>11.2f}{row['processor_min']:>8.2f}")
    content = {
        "command": f"python benchmarks/startup.py {'--quick' if options.quick else f'--rounds {rounds}'}",
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "rounds": rounds,
        "seconds": rows,
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
