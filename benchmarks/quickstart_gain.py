"""Does the quick start's teacher help? The same student, data, epochs and seeds: alone, with KL, with KL and LogSum.

    python benchmarks/quickstart_gain.py --seeds 0 1 2

Runs that are there already are not run again. Prints a table (mean, standard error over seeds, paired gain over training alone) and writes
results/quickstart_gain.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_kd.training.metrics import read_metrics

ARMS = {
    "alone": ["quickstart_alone"],
    "KL": ["quickstart", "distill.feature_weight=0"],
    "KL + LogSum": ["quickstart"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quickstart_gain", help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "quickstart_gain.json")
    options = parser.parse_args()

    results: dict[str, list[float]] = {arm: [] for arm in ARMS}
    facts: dict[str, Any] = {}
    for seed in options.seeds:
        for arm, (recipe, *overrides) in ARMS.items():
            folder = options.runs / f"{arm.replace(' + ', '_')}_{seed}"
            command = [sys.executable, "train.py", "--recipe", recipe, "--output", folder, f"seed={seed}", *overrides]
            print(f"{arm}, seed {seed}", flush=True)
            subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            last = [line for line in read_metrics(folder) if line["kind"] == "eval"][-1]
            results[arm].append(last["top1"])
            facts = json.loads((folder / "run.json").read_text())

    print(f"\n{'':<14}{'top-1 %':>10}{'s.e.':>8}{'gain':>8}{'s.e.':>8}   each seed")
    for arm, scores in results.items():
        gains = [score - alone for score, alone in zip(scores, results["alone"], strict=True)]
        row = f"{arm:<14}{mean(scores):>10.2f}{error(scores):>8.2f}{mean(gains):>8.2f}{error(gains):>8.2f}"
        print(row, "  ", "  ".join(f"{score:.2f}" for score in scores))
    options.output.parent.mkdir(exist_ok=True)
    content = {
        "command": f"python benchmarks/quickstart_gain.py --seeds {' '.join(map(str, options.seeds))}",
        "measure": "top-1 % of the last weights on the 2,000 embedded validation images",
        "seeds": options.seeds,
        "top1": results,
        **{key: facts[key] for key in ("commit", "hardware", "versions", "precision")},
    }
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{options.output}")


def error(values: list[float]) -> float:
    """The standard error of the mean; nan for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


if __name__ == "__main__":
    main()
