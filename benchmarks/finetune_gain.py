"""Does what a student learned from a teacher help it on other data? Fine-tuned from distilled weights, from weights trained alone, from none.

    python benchmarks/emoji9.py emoji9
    python benchmarks/finetune_gain.py --emoji9 emoji9 --seeds 0 1 2

Both ways: from Fashion-MNIST (12,000 embedded images) to Emoji9, and from Emoji9 to Fashion-MNIST, at 28 px; the teacher of the first is the
released one, that of Emoji9 is trained by the same recipe. Runs that are there already are not run again. Prints a table and writes
results/finetune.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_kd.training.metrics import read_metrics

DATA = {  # how a recipe of Fashion-MNIST becomes one of the other data, with as many steps
    "fashion": ["data.source=fashion_mnist", "data.num_classes=10", "augmentation.horizontal_flip=0.5"],
    "emoji9": ["data.source=image_folder", "data.num_classes=9", "augmentation.horizontal_flip=0.0"],
}
SCRATCH = "from scratch"
ARMS = ("distilled", "alone", SCRATCH)


def run(recipe: str, output: Path, data: Path | None, *overrides: str) -> float:
    """Top-1 of the last weights."""
    command = [sys.executable, "train.py", "--recipe", recipe, "--output", output, *(["--data", data] if data else []), *overrides]
    print(" ".join(map(str, command[1:])), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(
        list(map(str, command)), cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return float([line for line in read_metrics(output) if line["kind"] == "eval"][-1]["top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji9", type=Path, required=True, help="the folder that benchmarks/emoji9.py made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=("fashion", "emoji9"), default=["fashion", "emoji9"], help="what comes first")
    parser.add_argument(
        "--epochs", type=int, default=10, help="of fine-tuning, in which each of the 12,000 images is seen once an epoch"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "finetune_gain")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "finetune.json")
    options = parser.parse_args()
    folders = {"fashion": None, "emoji9": options.emoji9.resolve()}
    common = ["run.workers=0", "run.log_every_steps=50", "run.eval_every_epochs=5"]
    results: dict[str, Any] = {}
    for first in options.ways:
        second = "emoji9" if first == "fashion" else "fashion"
        # As many images an epoch: Emoji9 has 5,733, Fashion-MNIST 12,000.
        scale = {"fashion": 1, "emoji9": 2}
        teacher = "quickstart_teacher"
        if first == "emoji9":
            teacher = str(options.runs / "emoji9_teacher" / "student")
            recipe = [*DATA["emoji9"], "epochs=40", "data.train_images=auto"]
            results["emoji9 teacher"] = run(
                "quickstart_teacher", options.runs / "emoji9_teacher", folders["emoji9"], *recipe, *common
            )
        before: dict[str, list[float]] = {"distilled": [], "alone": []}
        after: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for seed in options.seeds:
            for arm, recipe_name in (("distilled", "quickstart"), ("alone", "quickstart_alone")):
                overrides = [*DATA[first], f"epochs={10 * scale[first]}", f"seed={seed}", *common]
                overrides += [f"teacher.name={teacher}"] if arm == "distilled" else []
                before[arm].append(run(recipe_name, options.runs / f"{first}_{arm}_{seed}", folders[first], *overrides))
            for arm in ARMS:
                overrides = [*DATA[second], f"epochs={options.epochs * scale[second]}", f"seed={seed}", *common]
                recipe_name = "quickstart_alone"
                if arm != SCRATCH:
                    weights = options.runs / f"{first}_{arm}_{seed}" / "student"
                    tuned = {"weights": str(weights), "frozen": [], "heads": "both", "layer_decay": 0.9, "holdout": 0.0}
                    overrides += [f"finetune={json.dumps({**tuned, 'patience_epochs': None})}", "optim.lr=1e-3"]
                    overrides += ["student.name=auto", "student.model_args={}"]
                after[arm].append(
                    run(recipe_name, options.runs / f"{first}_{second}_{arm}_{seed}".replace(" ", "_"), folders[second], *overrides)
                )
        results[f"{first} to {second}"] = {"before": before, "after": after}
        table(f"{first} to {second}", before, after)
    options.output.parent.mkdir(exist_ok=True)
    content = {
        "command": f"python benchmarks/finetune_gain.py --emoji9 emoji9 --seeds {' '.join(map(str, options.seeds))} --epochs {options.epochs}",
        "measure": "top-1 % of the last weights on the validation images of each data set",
        "seeds": options.seeds,
        "results": results,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")


def table(title: str, before: dict[str, list[float]], after: dict[str, list[float]]) -> None:
    print(f"\n{title:<22}{'before %':>10}{'after %':>10}{'s.e.':>8}{'distilled, paired':>20}{'s.e.':>8}   each seed")
    for arm, scores in after.items():
        gains = [ours - score for ours, score in zip(after["distilled"], scores, strict=True)]
        first = f"{mean(before[arm]):.2f}" if arm in before else ""
        print(
            f"{arm:<22}{first:>10}{mean(scores):>10.2f}{error(scores):>8.2f}{mean(gains):>20.2f}{error(gains):>8.2f}   "
            + "  ".join(f"{score:.2f}" for score in scores),
            flush=True,
        )


def error(values: list[float]) -> float:
    """The standard error of the mean; 0 of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
