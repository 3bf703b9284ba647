"""The model card, made from the files that a run stored: recipe.yaml, run.json, metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import UndefinedError
from timm.models import model_entrypoint

from deit_kd import recipe as recipes
from deit_kd.errors import UserError
from deit_kd.export.citations import bibtex, cited
from deit_kd.export.markdown import Written, render
from deit_kd.export.student import license
from deit_kd.files.atomic import clear, write_text
from deit_kd.files.documents import MEGABYTE, read_bytes, short
from deit_kd.files.imports import file_of
from deit_kd.recipe import Student
from deit_kd.text import for_markdown, for_terminal, license_name, printable, redact_all, redact_path
from deit_kd.training.best import exported
from deit_kd.training.metrics import read_metrics
from deit_kd.training.run_files import read_run

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PRECISION = {"no": "float32", "bf16": "bfloat16 (autocast)", "fp16": "float16 (autocast, with a loss scaler)"}
REMEDY = "give the command of the run again, which writes it anew"
SIZES = r"_(?:tiny|small|medium|base|large|huge|giant|little|nano|micro)(?=_|$)"


@contextmanager
def files_that_agree(run_folder: Path) -> Iterator[None]:
    """Each file of a run is checked when it is read; if two do not agree, the error is one line, too."""
    try:
        yield
    except UserError:
        raise
    except (UndefinedError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = for_terminal(" ".join(str(error).split())[:200])
        raise UserError(
            f"{run_folder}: its files do not agree with each other ({reason}); give the command of the run again, which writes them anew"
        ) from None


def write_card(run_folder: Path) -> Path:
    """Writes `student/README.md` of a run that has been evaluated, recipe and metrics beside it, and returns its path."""
    with files_that_agree(run_folder):
        return _write_card(run_folder)


def _write_card(run_folder: Path) -> Path:
    student = run_folder / "student"
    clear(student)
    write_text(student / "recipe.yaml", recipes.dump(recipes.load(run_folder / "recipe.yaml"), redact_recipe))
    recipe = recipes.load(student / "recipe.yaml")
    run = _public(read_run(run_folder))
    metrics = read_metrics(run_folder)
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    if not evaluations:
        raise UserError(f"{run_folder}: its metrics.jsonl holds no evaluation; give the command of the run again, which evaluates")
    last, chosen = exported(metrics, run)  # not the last, where the best are kept
    ema = "ema_top1" in last
    name = f"{run['name']}: {student_in_words(recipe.student, recipe.data.img_size)}"
    teachers = run["teachers"]
    on_hub = [teacher["name"].removeprefix("hf-hub:") for teacher in teachers if teacher["name"].startswith("hf-hub:")]
    data = ModelCardData(
        model_name=printable(name, 200),
        license=license([each["license"] for each in (*teachers, run.get("finetuned_from")) if each]),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "deit_kd", *(["knowledge-distillation"] if teachers else [])],
        datasets=None if recipe.data.source == "image_folder" else [recipe.data.source],
        metrics=["accuracy"],
        base_model=[each for each in on_hub if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", each)] or None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=recipe.data.source,
                dataset_name=printable(run["data"]["name"], 200),
                dataset_split="validation",
                metric_type="accuracy",
                metric_name=f"Top-{k}",
                metric_value=round(last[f"{'ema_' if ema else ''}top{k}"], 2),
            )
            for k in (1, 5)
        ],
    )
    labels = _label_names(student / "config.json")
    body = render(
        TEMPLATE,
        name=name,
        recipe=recipe,
        run=run,
        last=last,
        end=evaluations[-1],
        ema=ema,
        chosen=chosen,
        best=max(evaluations, key=lambda line: line["top1"]),
        scores=next((line for line in metrics if line["kind"] == "teacher"), {}),
        distillations=recipe.distillations(),
        classes=Written(", ".join(for_markdown(label, 100) for label in labels)) if len(labels) <= 100 else None,
        resized=math.floor(recipe.data.img_size / recipe.evaluation.crop_pct),  # as timm rounds
        precision=PRECISION.get(run["precision"], run["precision"]),
        papers=Written(
            "\n\n".join(
                map(bibtex, cited([each.distill for each in recipe.distillations()], recipe.label_weight, recipe.student.name))
            )
        ),
        own_file=own_file.stem if (own_file := file_of(model_entrypoint(recipe.student.name).__module__)) else None,
        ours=model_entrypoint(recipe.student.name).__module__.startswith("deit_kd."),
    )
    write_text(student / "metrics.jsonl", "".join(json.dumps(_public_line(line)) + "\n" for line in metrics))
    write_text(student / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")))
    return student / "README.md"


def _label_names(file: Path) -> list[str]:
    """label_names of a config.json, read by hand: names of folders may be no valid Unicode, which strict schemas refuse."""
    content = read_bytes(file, REMEDY, 64 * MEGABYTE)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is no JSON ({error}); {REMEDY}") from None
    labels = config.get("label_names") if isinstance(config, dict) else None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{file}: label_names: must be a list of names, got {short(labels)}; {REMEDY}")
    return labels


def student_in_words(student: Student, img_size: int) -> str:
    """The architecture's name if it says the shape, else its name and the shape in words."""
    name, size, arguments = student.name, img_size, student.model_args
    words = {"embed_dim": "width {}", "depth": "depth {}", "patch_size": "patches of {} px"}
    shape = [text.format(arguments[key]) for key, text in words.items() if key in arguments]
    if not shape and name.endswith(f"_{size}"):
        return name
    plain = re.sub(r"(_patch\d+)?_\d{3}$", "", name) if shape else re.sub(r"_\d{3}$", "", name)
    plain = re.sub(SIZES, "", plain) if shape else plain
    return ", ".join([f"{plain} of {shape[0]}" if shape else plain, *shape[1:], f"images of {size} px"])


def redact_recipe(document: Any) -> Any:
    """A recipe's values without the author's paths and secrets."""
    paths = ("name", "weights", "cache", "class_means")
    if isinstance(document, Mapping):
        return {
            key: redact_path(each) if key in paths and isinstance(each, str) else redact_recipe(each)
            for key, each in document.items()
        }
    return [redact_recipe(each) for each in document] if isinstance(document, list) else redact_all(document)


def _public(run: dict[str, Any]) -> dict[str, Any]:
    """run.json for others, also of a version that stored paths."""
    run = redact_all(run)
    for each in run["teachers"]:
        each |= {
            "name": redact_path(each["name"]),
            "weights": redact_path(each["weights"]),
            "license": license_name(each["license"]),
        }
    if origin := run.get("finetuned_from"):
        origin |= {"source": redact_path(origin["source"]), "license": license_name(origin["license"])}
    return run


def _public_line(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without names of pictures, which those of earlier versions hold."""
    return {key: [each for each in value if isinstance(each, int)] if key == "samples" else value for key, value in line.items()}
