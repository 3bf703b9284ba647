"""Everything that a machine with a GPU should be asked once: the GPU's tests, then the benchmarks, in order, into one folder.

    bash launch/gpu_check.sh gpu_check                 # as often as it says; each call takes at most ten minutes
    bash launch/gpu_check.sh try --device cpu --quick  # the same from end to end, small, on a CPU

A part that is done is not done again. FOLDER/parts.json says how each ended and by which command, FOLDER/NAME.log what it printed,
FOLDER/summary.md what came out. Exit code 75: there is more to do, give the command again. Exit code 1: all was tried, and something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paired import facts

AGAIN = 75  # sysexits.h calls it EX_TEMPFAIL


@dataclass(frozen=True)
class Part:
    """A program and the minutes that it has."""

    name: str
    minutes: float
    command: list[str]


def parts(folder: Path, device: str, quick: bool) -> list[Part]:
    def benchmark(name: str, minutes: float, *words: str, of: str = "") -> Part:
        return Part(name, minutes, ["-m", f"benchmarks.{of or name}", *words])

    def to(name: str) -> list[str]:
        return ["--output", str(folder / f"{name}.json")]

    if quick:
        few = ["-k", "orthonormal or skipped or batch_norms or laid_out"] if device == "cpu" else []
        return [
            Part("tests", 9, ["-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-n", "0", *few]),
            benchmark(
                "profile", 9, "--device", device, "--quick", "--eager", "--output", str(folder / "profile"), of="profile_step"
            ),
            benchmark("step", 9, "--device", device, "--quick", *to("step")),
            benchmark("teacher", 9, "--device", device, "--quick", *to("teacher")),
            benchmark("loader", 9, "--quick", "--workers", "1", *to("loader")),
            benchmark("decode", 9, "--device", device, "--rounds", "1", "--batch", "4", *to("decode")),
        ]
    sizes = ["--batch-sizes", "64", "256", "1024"]
    on = ["--device", device]
    student = "deit_small_distilled_patch16_224"
    dtypes, modes = ["--dtypes", "bfloat16", "float16"], ["--modes", "none", "default", "reduce-overhead"]
    workers = str(min(16, os.cpu_count() or 1))
    return [
        Part("tests", 8, ["-m", "pytest", "-m", "gpu", "tests/test_gpu.py"]),
        benchmark("profile", 4, *on, "--output", str(folder / "profile"), of="profile_step"),
        benchmark("profile_eager", 3, *on, "--eager", "--output", str(folder / "profile_eager"), of="profile_step"),
        benchmark("step_tiny", 9, *on, *sizes, *to("step_tiny"), of="step"),
        benchmark("step_small", 9, *on, *sizes, "--student", student, *to("step_small"), of="step"),
        benchmark("teacher", 9, *on, "--batch-sizes", "64", "256", *dtypes, *modes, *to("teacher")),
        benchmark("loader", 6, "--workers", workers, "--batch", "256", "--images", "4096", *to("loader")),
        benchmark("decode", 4, *on, *to("decode")),
    ]


def run(part: Part, folder: Path, device: str) -> dict[str, Any]:
    started, log = time.time(), folder / f"{part.name}.log"
    environment = {**os.environ, "DEIT_KD_TEST_DEVICE": device}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [sys.executable, *part.command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=60 * part.minutes,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return {"code": code, "seconds": round(time.time() - started, 1), "command": ["python", *part.command]}


def summary(folder: Path, done: dict[str, Any]) -> str:
    """A table of the parts, and the end of what each printed."""
    machine = facts()
    lines = [
        f"# {machine['hardware']}",
        "",
        f"Commit {machine['commit']}; " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        "",
    ]
    lines += ["| part | ended | seconds |", "|---|---|---|"]
    ended = {0: "well", 124: "out of time"}
    lines += [
        f"| {name} | {ended.get(each['code'], 'with code ' + str(each['code']))} | {each['seconds']} |"
        for name, each in done.items()
    ]
    for name in done:
        printed = (folder / f"{name}.log").read_text(errors="replace").splitlines()
        lines += ["", f"## {name}", "", f"`{' '.join(done[name]['command'])}`", "", "```", *printed[-40:], "```"]
        picture = folder / name / "profile.png"
        lines += ["", f"![timeline]({picture.relative_to(folder)})"] if picture.exists() else []
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call")
    parser.add_argument("--quick", action="store_true", help="small: tries the path from end to end")
    parser.add_argument("--again", nargs="*", default=[], metavar="PART", help="do these parts again")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    record, started, left = folder / "parts.json", time.time(), list[str]()
    done: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    done = {name: each for name, each in done.items() if name not in options.again}
    for part in parts(folder, options.device, options.quick):
        if part.name in done:
            continue
        if left or (time.time() - started) / 60 + part.minutes > options.minutes:
            left.append(part.name)
            continue
        print(f"{part.name}: at most {part.minutes:g} minutes; {folder / part.name}.log", flush=True)
        done[part.name] = run(part, folder, options.device)
        print(f"{part.name}: code {done[part.name]['code']} after {done[part.name]['seconds']} s", flush=True)
        record.write_text(json.dumps(done, indent=1) + "\n")
        (folder / "summary.md").write_text(summary(folder, done))
    if left:
        print(f"left: {', '.join(left)}; give the same command again")
        return AGAIN
    failed = [name for name, each in done.items() if each["code"]]
    print(f"done: {folder / 'summary.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
