"""The model card, made from what a run stored (recipe.yaml, run.json, metrics.jsonl) and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deit_kd import recipe as recipes
from deit_kd.recipe import Recipe
from deit_kd.tracking import read_metrics

PROJECTOR_PAPER = """@inproceedings{miles2024understanding,
  title = {Understanding the Role of the Projector in Knowledge Distillation},
  author = {Miles, Roy and Mikolajczyk, Krystian},
  booktitle = {AAAI},
  year = {2024}
}"""
NORM_DIRECTION_PAPER = """@article{wang2023improving,
  title = {Improving Knowledge Distillation via Regularizing Feature Norm and Direction},
  author = {Wang, Yuzhu and Cheng, Lechao and Duan, Manni and Wang, Yongheng and Feng, Zunlei and Kong, Shu},
  journal = {arXiv:2305.17007},
  year = {2023}
}"""


def write_card(run_folder: Path) -> Path:
    """Writes `student/README.md` of a finished run and returns its path."""
    recipe = recipes.load(run_folder / "recipe.yaml")
    run = json.loads((run_folder / "run.json").read_text())
    metrics = read_metrics(run_folder)
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    last = evaluations[-1]
    exported = "ema_" if "ema_top1" in last else ""
    name = f"{run['name']}: {recipe.student.name}"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=recipe.data.source,
            dataset_name=run["data"]["val"],
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(last[f"{exported}{key}"], 2),
        )
        for key, label in (("top1", "Top-1"), ("top5", "Top-5"))
    ]
    data = ModelCardData(
        model_name=name,
        language=None,
        license="apache-2.0",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "deit_kd", *(["knowledge-distillation"] if recipe.teacher else [])],
        datasets=[recipe.data.source],
        metrics=["accuracy"],
        eval_results=results,
        **({"base_model": run["teacher"]["name"]} if recipe.teacher and "/" in recipe.teacher.name else {}),
    )
    body = "\n\n".join(_sections(recipe, run, metrics, evaluations, exported, name))
    path = run_folder / "student" / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(path)
    return path


def _sections(
    recipe: Recipe, run: dict[str, Any], metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], exported: str, name: str
) -> list[str]:
    last, teacher = evaluations[-1], run["teacher"]
    what = f"distilled from **{teacher['name']}**" if teacher else "trained alone, without a teacher"
    sections = [
        f"# {name}",
        f"An image classifier for {run['data']['num_classes']} classes, {what} with [deit_kd]"
        f" {run['deit_kd']}. The weights here are the {'moving average' if exported else 'last'} weights of the run.",
        "## Results\n\n" + _results(recipe, run, metrics, evaluations),
        "## Student\n\n"
        + _table(
            [
                ("Architecture", f"`{recipe.student.name}` {recipe.student.model_args or ''}"),
                ("Parameters", f"{run['student']['parameters']:,}"),
                ("GMACs", f"{run['student']['gmacs']:.3f}"),
                ("Image size", f"{recipe.data.img_size} x {recipe.data.img_size}"),
                ("Mean, std", f"{list(recipe.data.mean)}, {list(recipe.data.std)}"),
            ]
        ),
    ]
    if teacher and recipe.distill and recipe.teacher:
        measured = next((line for line in metrics if line["kind"] == "teacher"), None)
        shown = f"{measured['teacher_top1']:.2f} %" if measured else "not measured"
        random = " **These are random weights: a test, not a teacher.**" if teacher["weights"] == "random" else ""
        sections.append(
            "## Teacher\n\n"
            + _table(
                [
                    ("Name", f"`{teacher['name']}` (weights: {teacher['weights']}){random}"),
                    ("sha256 of its tensors", f"`{teacher['sha256']}`"),
                    ("Licence", teacher["license"]),
                    ("Parameters, GMACs", f"{teacher['parameters']:,}, {teacher['gmacs']:.3f}"),
                    ("Top-1 on the validation data", shown),
                ]
            )
            + "\n\nLoss: cross-entropy on the class head"
            + (f" + {recipe.distill.kd_weight:g} x KL (T = {recipe.distill.temperature:g}) on the distillation head" if recipe.distill.kd_weight else "")
            + (
                f" + {recipe.distill.feature_weight:g} x `{recipe.distill.feature_loss}` (power {recipe.distill.power:g}) between the "
                f"projected mean patch token and the pooled teacher features ({run['projector_parameters']:,} projector parameters, "
                f"not part of these weights). Its batch statistics are those of {run['micro_batch_size']} images."
                if recipe.distill.feature_weight
                else "."
            )
        )
    sections += [
        "## How to load\n\n```python\n"
        + ("import deit_kd  # registers the architecture\n" if "convstem" in recipe.student.name else "")
        + 'import timm\n\nmodel = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()\n'
        "config = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n```",
        "## Training\n\n"
        + _table(
            [
                ("Data", f"{run['data']['train']}: {run['data']['train_images']:,} training, {run['data']['val_images']:,} validation images"),
                ("Steps", f"{last['step']:,} of {run['total_steps']:,} ({last['epoch']:.4g} of {recipe.epochs} epochs)"),
                ("Global batch", f"{run['global_batch_size']} = {run['processes']} processes x {run['accumulation_steps']} x {run['micro_batch_size']}"),
                ("Command", f"`{run['command']}`"),
                ("Commit", f"`{run['commit']}`"),
                ("Seed", str(recipe.seed)),
                ("Precision", run["precision"]),
                ("Hardware", run["hardware"]),
                ("Hours", f"{run['hours']:.3f}"),
                ("Versions", ", ".join(f"{key} {value}" for key, value in run["versions"].items())),
            ]
        )
        + "\n\nThe complete recipe is `recipe.yaml`, every logged number is in `metrics.jsonl`, both beside this card.",
        "## Limits\n\n"
        f"Measured on {run['data']['val']} alone, with one seed: other images, sizes and label sets are untested. Predictions follow "
        "the biases of the training data"
        + (" and of the teacher" if teacher else "")
        + ". Not for decisions about people."
        + (f" The run was stopped before its last step ({last['step']} of {run['total_steps']})." if last["step"] < run["total_steps"] else ""),
        f"## Citation\n\nThe projector and the LogSum loss:\n\n```bibtex\n{PROJECTOR_PAPER}\n```\n\n"
        f"The norm-and-direction loss, implemented beside it:\n\n```bibtex\n{NORM_DIRECTION_PAPER}\n```",
    ]
    return sections


def _results(recipe: Recipe, run: dict[str, Any], metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    last = evaluations[-1]
    best = max(evaluations, key=lambda line: line["top1"])
    rows = [("Last", last["step"], last["top1"], last["top5"])]
    if "ema_top1" in last:
        rows.append(("EMA, last", last["step"], last["ema_top1"], last["ema_top5"]))
    rows.append(("Best by validation (weights not kept)", best["step"], best["top1"], best["top5"]))
    teachers = [line for line in metrics if line["kind"] == "teacher"]
    rows += [("Teacher", 0, line["teacher_top1"], line["teacher_top5"]) for line in teachers[:1]]
    table = ["| Weights | step | top-1 % | top-5 % |", "|---|---|---|---|"]
    table += [f"| {name} | {step or ''} | {top1:.2f} | {top5:.2f} |" for name, step, top1, top5 in rows]
    heads = ""
    if "class_head_top1" in last:
        heads = (
            f"\n\nTop-1 is of the mean of both heads, as the exported model returns it; alone, the class head has "
            f"{last['class_head_top1']:.2f} % and the distillation head {last['distillation_head_top1']:.2f} %."
        )
    return "\n".join(table) + f"\n\nOn {last['images']:,} images of {run['data']['val']}, each counted once." + heads


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
