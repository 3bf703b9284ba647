"""The end of the quick start: a contact sheet by the exported student, loaded with plain timm, and the table of the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deit_kd.data import open_source
from deit_kd.models.described import RELEASED
from deit_kd.plots import contact_sheet
from deit_kd.training.best import exported
from deit_kd.training.metrics import read_metrics

SEED_0 = (84.45, 86.45)  # top-1 % of the last weights: sums in another order end elsewhere


def main(run: Path) -> None:
    student = timm.create_model(f"local-dir:{(run / 'student').resolve()}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(student)
    transform = timm.data.create_transform(**config, is_training=False)
    labels = json.loads((run / "student" / "config.json").read_text())["label_names"]

    held_out = open_source("fashion_mnist", None, "val")
    images, truth = zip(*(held_out[index] for index in range(0, len(held_out), -(-len(held_out) // 32))), strict=True)
    with torch.inference_mode():
        confidences, guesses = student(torch.stack([transform(image) for image in images])).softmax(1).max(1)
    sheet = run / "plots" / "contact_sheet.png"
    contact_sheet(images, [labels[i] for i in truth], [labels[i] for i in guesses.tolist()], confidences.tolist(), sheet)

    facts, metrics = json.loads((run / "run.json").read_text()), read_metrics(run)
    taught = read_metrics(RELEASED / facts["teachers"][0]["name"])
    teacher = next(line for line in metrics if line["kind"] == "teacher")
    last, chosen = exported(metrics, facts)
    alone = json.loads((Path(__file__).resolve().parent.parent / "results" / "quickstart_gain.json").read_text())["top1"]["alone"]
    parameters = facts["student"]["parameters"]
    print(f"\n{'':<15}{'parameters':>12}{'top-1 %':>10}{'seconds':>10}")
    print(f"{'teacher':<15}{facts['teachers'][0]['parameters']:>12,}{teacher['teacher_top1']:>10.2f}{taught[-1]['seconds']:>10.0f}")
    print(f"{'student':<15}{parameters:>12,}{last['top1']:>10.2f}{last['seconds']:>10.0f}")
    print(f"{'student alone':<15}{parameters:>12,}{mean(alone):>10.2f}")
    if chosen:
        print(f"\nThe student's weights were {chosen}.")
    print(
        f"\nThe student alone was not trained here: it is the mean of {len(alone)} seeds of results/quickstart_gain.json, after all ten epochs.\n"
        f"Seed 0 taught for ten epochs ended between {SEED_0[0]} and {SEED_0[1]} on the machines and numbers of threads tried."
    )
    print(f"\nstudent        {run / 'student'}\ncard           {run / 'student' / 'README.md'}")
    print(f"plots          {run / 'plots'}\ncontact sheet  {sheet}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
