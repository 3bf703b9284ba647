"""Verbs that use a student: evaluate, predict, fine-tune, convert, export, publish, card."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from deit_kd import recipe as recipes
from deit_kd.cli import streams
from deit_kd.cli.command_line import bounded
from deit_kd.errors import UserError
from deit_kd.text import for_terminal

WEIGHTS = "a run, an exported folder, hf-hub:ORG/NAME, a timm tag, a released name, or an authors' file"


def _weights_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("weights", help=WEIGHTS)
    verb.add_argument(
        "--img-size", type=bounded(int, 1, 4096), help="pixels a side, where they shall differ from the network's own"
    )
    verb.add_argument("--batch-size", type=bounded(int, 1, 100_000), default=64)
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _run_of(folder: Path) -> Path:
    """The run, also where its student/ is named."""
    above = folder.resolve().parent
    is_student = folder.resolve().name == "student" and not (folder / "run.json").is_file() and (above / "run.json").is_file()
    return above if is_student else folder


def _add_evaluate(verbs: Any) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="accuracy, calibration, classes, confusions, speed of any network: a table, JSON, a picture",
        epilog="example: deit-kd evaluate runs/deit_ti --data IMAGENET --teacher regnety_160.deit_in1k",
    )
    _weights_options(verb)
    verb.add_argument(
        "--data", type=Path, help="DIR/val/CLASS/ or DIR/CLASS/, or what --source takes (default: embedded Fashion-MNIST)"
    )
    verb.add_argument("--source", help="a data.source of the recipes (default: image_folder, or fashion_mnist without --data)")
    verb.add_argument("--split", choices=("val", "train"), default="val")
    verb.add_argument(
        "--benchmark", help="imagenet, imagenet-v2, -real, -a, -r, -sketch or -c, laid out in --data as by its authors"
    )
    verb.add_argument("--teacher", help="whose decisions to compare with")
    verb.add_argument("--restrict", action="store_true", help="answers are among the data's classes only")
    verb.add_argument("--on-bad-image", choices=("refuse", "skip"), default="refuse")
    verb.add_argument(
        "--exif-orientation",
        choices=("apply", "ignore"),
        help="whether images are turned as their EXIF data say (default: apply; of a --benchmark ignore, as published numbers do)",
    )
    verb.add_argument("--label-column", help="of several labels that a table or shards have")
    verb.add_argument("--output", type=Path, help="the folder of the report (default: runs/evaluation_NAME)")
    verb.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> None:
    """Writes a report, prints its table."""
    from deit_kd.evaluation.report import evaluate

    named = Path(options.weights).resolve().parent if Path(options.weights).name == "student" else Path(options.weights)
    folder = options.output or Path("runs") / f"evaluation_{named.name.replace(':', '_')}"
    evaluate(
        options.weights,
        folder,
        options.data,
        source=options.source,
        split=options.split,
        benchmark=options.benchmark,
        teacher=options.teacher,
        device=_device(options.device),
        img_size=options.img_size,
        batch_size=options.batch_size,
        restrict=options.restrict,
        on_bad_image=options.on_bad_image,
        exif_orientation=options.exif_orientation,
        label_column=options.label_column,
    )
    print(for_terminal(f"report {folder}"))


def _add_predict(verbs: Any) -> None:
    verb = verbs.add_parser(
        "predict",
        help="what a network takes images for, a JSON object a line; exit code 1 if one could not be read",
        epilog="example: deit-kd predict quickstart shoe.png | jq .predictions[0].label",
    )
    _weights_options(verb)
    verb.add_argument("images", nargs="+", help="files and folders; - reads an image, or paths a line, from standard input")
    verb.add_argument("--top", type=bounded(int, 1, 1_000_000), default=5, help="predictions of each image (default: 5)")
    verb.add_argument(
        "--exif-orientation", choices=("apply", "ignore"), default="apply", help="turn images as viewers do (default), or not"
    )
    verb.set_defaults(run=predict)


def predict(options: argparse.Namespace) -> None:
    """Prints a line an image."""
    from deit_kd.evaluation.predict import predict
    from deit_kd.models import load_student

    model, failed = load_student(options.weights, img_size=options.img_size), 0
    upright = options.exif_orientation == "apply"
    for line in predict(model, options.images, _device(options.device), options.batch_size, options.top, upright):
        print(json.dumps(line), flush=True)  # in ASCII: names may hold bytes that no encoding has
        if "error" in line:
            failed += 1
            print(for_terminal(f"{line['image']}: {line['error']}"), file=sys.stderr)
        if streams.is_gone(sys.stdout):  # the reader has enough
            break
    sys.exit(1 if failed else 0)


def _add_finetune(verbs: Any) -> None:
    verb = verbs.add_parser(
        "finetune",
        help="go on training a student with other images and classes",
        epilog="example: deit-kd finetune runs/deit_ti --data flowers --output runs/flowers epochs=50 finetune.holdout=0.1",
    )
    verb.add_argument("weights", help=WEIGHTS)
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    verb.add_argument(
        "--data", type=Path, required=True, help="DIR with DIR/train/CLASS/ and DIR/val/CLASS/, or what data.source takes"
    )
    verb.add_argument("--output", type=Path, help="the run folder (default: runs/finetune_NAME)")
    verb.add_argument("--recipe", default="finetune", help="finetune (default), finetune:probe, finetune:taught, or another")
    verb.add_argument(
        "--img-size", type=bounded(int, 1, 4096), help="pixels a side, where they shall differ from the network's own"
    )
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.add_argument(
        "--max-steps", type=bounded(int, 1, 10**12), help="stop after so many steps; the schedule stays that of the whole run"
    )
    verb.set_defaults(run=finetune)


def finetune(options: argparse.Namespace) -> None:
    """Becomes train.py with the recipe, the weights, and their size and normalization."""
    from deit_kd.models.loading import preprocessing_of

    config = preprocessing_of(options.weights, options.img_size)
    weights = Path(options.weights).resolve() if Path(options.weights).exists() else options.weights
    ours = {
        "finetune.weights": weights,
        "data.img_size": config["input_size"][-1],
        "data.mean": config["mean"],
        "data.std": config["std"],
        "evaluation.crop_pct": config["crop_pct"],
        "evaluation.interpolation": config["interpolation"],
    }
    output = options.output or Path("runs") / f"finetune_{Path(options.weights).stem}"
    script = Path(recipes.FOLDER).parent / "train.py"
    command = [sys.executable, script, "--recipe", options.recipe, "--data", options.data, "--output", output]
    command += ["--max-steps", options.max_steps] if options.max_steps else []
    command += ["--device", options.device, *(f"{key}={value}" for key, value in ours.items()), *options.overrides]
    sys.stdout.flush()
    os.execv(sys.executable, list(map(str, command)))


def _add_convert(verbs: Any) -> None:
    verb = verbs.add_parser(
        "convert",
        help="authors' weights as a folder that timm loads",
        epilog="example: deit-kd convert ckpt_epoch_299.pth deit_ti_srd",
    )
    verb.add_argument("source", type=Path, help=".pth of the projector paper or DeiT, .pth.tar of VkD, .safetensors")
    verb.add_argument("folder", type=Path, help="the folder to make")
    verb.add_argument("--class-names", type=Path, help="a JSON list, or a text file with a name a line")
    verb.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> None:
    """Makes a folder of an authors' file and tells what was in it."""
    from deit_kd.export import convert

    for line in convert(options.source, options.folder, options.class_names):
        print(for_terminal(line))


def _add_export(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="a student as ONNX, torch.export program, or with half the bytes; checked numerically")
    verb.add_argument("weights", help=WEIGHTS)
    verb.add_argument("--format", required=True, choices=("onnx", "torch-export", "fp16", "bf16"))
    verb.add_argument("--output", type=Path, help="the file or folder to make (default: beside the student)")
    verb.set_defaults(run=export)


def export(options: argparse.Namespace) -> None:
    """Writes a student in another format."""
    from deit_kd.export.formats import export

    path, difference, before = export(options.weights, options.format, options.output)
    there = "is there already, whole; " if before else ""
    print(for_terminal(f"{path}: {there}logits differ by {difference:.1g} of the largest at most"))


def _add_publish(verbs: Any) -> None:
    verb = verbs.add_parser(
        "publish",
        help="a run's student to the hub, checked first, in one commit",
        epilog="example: deit-kd publish runs/deit_ti --to ORG/NAME --dry-run",
    )
    verb.add_argument("run_folder", type=Path, metavar="RUN")
    verb.add_argument("--to", required=True, metavar="ORG/NAME")
    verb.add_argument("--dry-run", action="store_true", help="everything but the upload")
    verb.add_argument("--private", action="store_true", help="a new repository is private")
    verb.add_argument("--license", "--licence", help="of the weights (default: what the card says)")
    verb.add_argument("--despite-teacher", action="store_true", help="a permissive license although the teacher's is not")
    verb.set_defaults(run=publish)


def publish(options: argparse.Namespace) -> None:
    """Uploads a student."""
    from deit_kd.export.publish import publish

    settings = {"private": options.private, "dry_run": options.dry_run, "license": options.license}
    for line in publish(_run_of(options.run_folder), options.to, despite_teacher=options.despite_teacher, **settings):
        print(for_terminal(line))


def _add_card(verbs: Any) -> None:
    verb = verbs.add_parser("card", help="writes the model card of a run again, from what the run stored")
    verb.add_argument("run_folder", type=Path, metavar="RUN")
    verb.set_defaults(run=card)


def card(options: argparse.Namespace) -> None:
    """Writes a card again."""
    folder = _run_of(options.run_folder)
    if not (folder / "run.json").is_file() or not (folder / "student").is_dir():
        raise UserError(f"{options.run_folder}: is no run that came to its end; give a folder that train.py made")
    from deit_kd.export import write_card

    print(for_terminal(write_card(folder)))


VERBS = (_add_evaluate, _add_predict, _add_finetune, _add_convert, _add_export, _add_publish, _add_card)
