"""The model card, made from what a run stored (recipe.yaml, run.json, metrics.jsonl) and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError
from timm.models import model_entrypoint

from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.release.export import licence
from deit_kd.run_files import read_run
from deit_kd.text import for_terminal
from deit_kd.tracking import read_metrics

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def _of_files_that_agree(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Each file of a run is checked when it is read; what one lacks that another promises is one line, too."""

    @wraps(make)
    def made(run_folder: Path) -> Path:
        try:
            return make(run_folder)
        except UserError:
            raise
        except (UndefinedError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = for_terminal(" ".join(str(error).split())[:200])
            raise UserError(
                f"{run_folder}: its files do not agree with each other ({reason}); give the command of the run again, which writes them anew"
            ) from None

    return made


@_of_files_that_agree
def write_card(run_folder: Path) -> Path:
    """Writes `student/README.md` of a run that has been evaluated, recipe and metrics beside it, and returns its path."""
    recipe = recipes.load(run_folder / "recipe.yaml")
    run = read_run(run_folder)
    metrics = read_metrics(run_folder)
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    if not evaluations:
        raise UserError(f"{run_folder}: its metrics.jsonl holds no evaluation; give the command of the run again, which evaluates")
    last = evaluations[-1]
    ema = "ema_top1" in last
    name = f"{recipe.student.name}, {run['name']}"
    teachers = run["teachers"]
    on_hub = [teacher["name"].removeprefix("hf-hub:") for teacher in teachers if teacher["name"].startswith("hf-hub:")]
    data = ModelCardData(
        model_name=name,
        license=licence([each["license"] for each in (*teachers, run.get("finetuned_from")) if each]),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "deit_kd", *(["knowledge-distillation"] if teachers else [])],
        datasets=None if recipe.data.source == "image_folder" else [recipe.data.source],
        metrics=["accuracy"],
        base_model=on_hub or None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=recipe.data.source,
                dataset_name=run["data"]["name"],
                dataset_split="validation",
                metric_type="accuracy",
                metric_name=f"Top-{k}",
                metric_value=round(last[f"{'ema_' if ema else ''}top{k}"], 2),
            )
            for k in (1, 5)
        ],
    )
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(TEMPLATE.read_text())
    body = template.render(
        name=name,
        recipe=recipe,
        run=run,
        last=last,
        ema=ema,
        best=max(evaluations, key=lambda line: line["top1"]),
        scores=next((line for line in metrics if line["kind"] == "teacher"), {}),
        lessons=recipe.lessons(),
        labels=json.loads((run_folder / "student" / "config.json").read_text())["label_names"],
        ours=model_entrypoint(recipe.student.name).__module__.startswith("deit_kd."),
    )
    shutil.copyfile(run_folder / "metrics.jsonl", run_folder / "student" / "metrics.jsonl")
    stated = (run_folder / "recipe.yaml").read_text()  # public, too: where its author keeps weights is not its business
    (run_folder / "student" / "recipe.yaml").write_text(re.sub(r"^(\s*\w+: )/.*/", r"\1.../", stated, flags=re.MULTILINE))
    path = run_folder / "student" / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(path)
    return path
