"""The verbs of `deit-kd`; training itself is train.py."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deit_kd
from deit_kd import recipe as recipes
from deit_kd.cli import streams
from deit_kd.cli.command_line import Parser, bounded
from deit_kd.errors import UserError
from deit_kd.text import error_for_terminal, for_terminal

MOST_VIEWS = 100_000
WEIGHTS = "a run, an exported folder, hf-hub:ORG/NAME, a timm tag, a released name, or an authors' file"


def main(arguments: list[str] | None = None) -> None:
    """Runs a verb; user errors end in one line and exit code 2."""
    streams.forgive()
    parser = Parser(
        prog="deit-kd",
        description="What surrounds training: grids of runs, data, a look at the machine, and what is done with students.",
        epilog="Training itself is train.py; python train.py --help lists the recipes.",
    )
    parser.add_argument("--version", action="version", version=f"deit_kd {deit_kd.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("class-means", help="the teacher's class means over the training images, for norm_direction")
    _recipe_options(verb)
    verb.add_argument("--output", type=Path, required=True, help="the file to write, .safetensors")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.set_defaults(run=class_means)

    verb = verbs.add_parser(
        "cache-teacher",
        help="what the teacher says of the training images, written down for the next students",
        epilog="example: deit-kd cache-teacher deit_ti --data IMAGENET --output caches/regnety --views 50 --features int8 --logits top:100",
    )
    _recipe_options(verb)
    verb.add_argument("--output", type=Path, required=True, help="the folder to make, or to go on with")
    verb.add_argument(
        "--views",
        type=bounded(int, 1, MOST_VIEWS),
        help="of each image; epochs beyond them show them again (default: the recipe's epochs)",
    )
    verb.add_argument("--features", help="float32, bf16, int8, pca:R or none (default: bf16 if the recipe compares features)")
    verb.add_argument("--logits", help="float32, full (float16), top:K or none (default: full if the recipe compares logits)")
    verb.add_argument("--shard-mb", type=bounded(float, 0.001, 1_000_000), default=64, help="where a file ends (default: 64)")
    verb.add_argument(
        "--device-batch-size", type=bounded(int, 1, 1_000_000), help="most images on a device at once (default: 256, on a CPU 64)"
    )
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.set_defaults(run=cache_teacher)

    verb = verbs.add_parser(
        "grid",
        help="every combination of overrides as a run; a table and a plot",
        epilog="example: deit-kd grid quickstart distill.power=1,2,4,5 seed=0,1,2 --output runs/power",
    )
    _recipe_options(verb)
    verb.add_argument("--output", type=Path, help="the folder of the runs (default: runs/grid_RECIPE)")
    verb.add_argument("--jobs", type=bounded(int, 1, 1024), default=1, help="runs at a time, each in a process of its own")
    verb.set_defaults(run=grid)

    verb = verbs.add_parser("pack", help="tar shards of an image folder, which train with data.source=shards")
    verb.add_argument("--data", type=Path, required=True, help="DIR with DIR/train/CLASS/ and DIR/val/CLASS/")
    verb.add_argument("--output", type=Path, required=True, help="the folder to make")
    verb.add_argument(
        "--short-side",
        type=bounded(int, 1, 100_000),
        help="pixels to which larger images are shrunk; without it files are copied as they are",
    )
    verb.add_argument("--shard-mb", type=bounded(int, 1, 1_000_000), default=256, help="where a shard ends (default: 256)")
    verb.set_defaults(run=pack)

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

    verb = verbs.add_parser(
        "convert",
        help="authors' weights as a folder that timm loads",
        epilog="example: deit-kd convert ckpt_epoch_299.pth deit_ti_srd",
    )
    verb.add_argument("source", type=Path, help=".pth of the projector paper or DeiT, .pth.tar of VkD, .safetensors")
    verb.add_argument("folder", type=Path, help="the folder to make")
    verb.add_argument("--class-names", type=Path, help="a JSON list, or a text file with a name a line")
    verb.set_defaults(run=convert)

    verb = verbs.add_parser("export", help="a student as ONNX, torch.export program, or with half the bytes; checked numerically")
    verb.add_argument("weights", help=WEIGHTS)
    verb.add_argument("--format", required=True, choices=("onnx", "torch-export", "fp16", "bf16"))
    verb.add_argument("--output", type=Path, help="the file or folder to make (default: beside the student)")
    verb.set_defaults(run=export)

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

    verb = verbs.add_parser("card", help="writes the model card of a run again, from what the run stored")
    verb.add_argument("run_folder", type=Path, metavar="RUN")
    verb.set_defaults(run=card)

    verb = verbs.add_parser(
        "doctor",
        help="what is wrong with this environment; exit code 0, 1 for a warning, 2 for a fault",
        epilog="under a launcher: torchrun --nproc_per_node 2 -m deit_kd doctor deit_ti --data DIR",
    )
    _recipe_options(verb)
    verb.add_argument("--output", type=Path, help="the run folder (default: runs/RECIPE)")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.set_defaults(run=doctor)

    verb = verbs.add_parser(
        "plan",
        help="parameters, FLOPs, memory, disk, hours on devices that need not be there; trains nothing",
        epilog="example: deit-kd plan deit_ti --gpus 8 --gpu h200",
    )
    _recipe_options(verb)
    verb.add_argument(
        "--gpus", type=bounded(int, 1, 1_000_000), default=1, help="processes of a machine, each with a GPU (default: 1)"
    )
    verb.add_argument("--nodes", type=bounded(int, 1, 1_000_000), default=1, help="machines (default: 1)")
    verb.add_argument("--gpu", help="h200, h100, a100, l40s, 5090, 4090, 3090, or cpu for this machine's (default: a table of all)")
    verb.add_argument("--images", type=bounded(int, 1, 10**12), help="of an epoch, where there are no --data")
    verb.add_argument("--measure", action="store_true", help="30 steps here, beside what was predicted")
    verb.add_argument("--steps", type=bounded(int, 1, 1_000_000), default=30, help="of --measure (default: 30)")
    _bench_options(verb)
    verb.set_defaults(run=plan)

    verb = verbs.add_parser(
        "bench",
        help="seconds of a step in data, teacher, student, communication; the bottleneck, and what to change",
        epilog="under a launcher: torchrun --nproc_per_node 2 -m deit_kd bench deit_ti --data DIR",
    )
    _recipe_options(verb)
    verb.add_argument("--steps", type=bounded(int, 1, 1_000_000), default=50, help="timed in each pass (default: 50)")
    _bench_options(verb)
    verb.set_defaults(run=bench)

    words = sys.argv[1:] if arguments is None else arguments
    if not words or (words[0] not in verbs.choices and not words[0].startswith("-")):
        which = f"{words[0]!r} is no verb{recipes.nearest(words[0], verbs.choices)}" if words else "a verb is missing"
        print(f"error: deit-kd: {for_terminal(which)}; verbs: {', '.join(verbs.choices)}; see deit-kd --help", file=sys.stderr)
        sys.exit(2)
    options, more = parser.parse_known_args(arguments)  # overrides that stand behind an option are left over
    takes_more = hasattr(options, "overrides")
    if wrong := [word for word in more if word.startswith("-") or "=" not in word or not takes_more]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if takes_more:
        options.overrides += more
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error_for_terminal(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        place = error.filename or getattr(options, "output", None) or options.verb
        remedy = "; free some, or give another place" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"error: {for_terminal(f'{place}: {error.strerror or error}{remedy}')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; give the same command again", file=sys.stderr)
        sys.exit(130)


def _recipe_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a name in recipes/, such as deit_ti or deit_vkd:small, or the path of a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe; of a grid key=value,value,...")
    verb.add_argument("--data", type=Path, help="the folder of the data")


def _bench_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what measures")
    verb.add_argument("--device-batch-size", type=bounded(int, 1, 1_000_000), help="most images on a device at once")
    verb.add_argument("--json", type=Path, help="a file to write the numbers to")


def _weights_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("weights", help=WEIGHTS)
    verb.add_argument(
        "--img-size", type=bounded(int, 1, 4096), help="pixels a side, where they shall differ from the network's own"
    )
    verb.add_argument("--batch-size", type=bounded(int, 1, 100_000), default=64)
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def class_means(options: argparse.Namespace) -> None:
    """Computes a file of class means, or checks the one that is there."""
    recipe = recipes.load(options.recipe, options.overrides)
    distillations = [distillation for distillation in recipe.distillations() if distillation.distill.class_means is not None]
    if len({distillation.teacher for distillation in distillations}) != 1:
        raise UserError(
            f"recipe {options.recipe}: {'no' if not distillations else 'more than one'} teacher's class means are read in it"
        )
    from accelerate.utils import broadcast_object_list

    from deit_kd.distributed.accelerator import on_cpu, plain_accelerator
    from deit_kd.files.outputs import must_not_be_data, settle, workspace
    from deit_kd.models import build
    from deit_kd.teacher_cache.class_means import load_or_compute
    from deit_kd.training import acceleration

    must_not_be_data(options.output, options.data)
    accelerator = plain_accelerator(on_cpu(options.device))
    source, val = build.open_data(recipe, options.data)
    teachers = build.build_teachers(recipe, source.class_names)
    teacher = teachers[recipe.distillations().index(distillations[0])].to(accelerator.device)
    acceleration.prepare(recipe.run, [teacher], partial(build.example_images, recipe, val), accelerator)
    placed, output = build.loader_config(recipe, accelerator, lambda text: accelerator.print(for_terminal(text))), options.output
    with workspace(output, "deit-kd class-means") if accelerator.is_main_process else nullcontext() as made:
        file = [output if made is None or os.path.lexists(output) else made]
        broadcast_object_list(file)  # one process looks
        means = load_or_compute(file[0], recipe, teacher, source, accelerator, placed)
        if made is not None and file[0] == made:
            settle(made, output)
    accelerator.print(f"{options.output}: {means.shape[0]} classes x {means.shape[1]}; pass distill.class_means={options.output}")


def cache_teacher(options: argparse.Namespace) -> None:
    """Writes a cache of the teacher, or the rest of it."""
    recipe = recipes.load(options.recipe, options.overrides)
    if reasons := recipes.beyond_a_cache(recipe):
        raise UserError(f"recipe {options.recipe}: {reasons[0]}")
    (teacher,) = {distillation.teacher for distillation in recipe.distillations()}
    if teacher.cache:
        raise UserError(f"teacher.cache={teacher.cache}: caching asks the teacher itself; set it to null")
    views = recipe.epochs if options.views is None else options.views
    if views > MOST_VIEWS:
        raise UserError(
            f"epochs: {views} are more views than the {MOST_VIEWS:,} of a cache; give --views, and later epochs show them again"
        )
    from deit_kd.distributed.accelerator import make_accelerator
    from deit_kd.files.outputs import must_not_be_data
    from deit_kd.models import Teacher, build
    from deit_kd.teacher_cache.write import write_cache
    from deit_kd.training import acceleration

    must_not_be_data(options.output, options.data)
    compared = [distillation.distill for distillation in recipe.distillations()]
    features = options.features or ("bf16" if any(distill.feature_weight for distill in compared) else "none")
    logits = options.logits or ("full" if any(distill.kd_weight for distill in compared) else "none")
    accelerator = make_accelerator(recipe, options.device, options.output)
    with accelerator.main_process_first():
        sources = build.open_data(recipe, options.data)
    asked = build.build_teachers(recipe, sources[0].class_names)[0]
    assert isinstance(asked, Teacher), "no cache was stated"
    example = partial(build.example_images, recipe, sources[1])
    accelerated = acceleration.prepare(recipe.run, [asked.to(accelerator.device)], example, accelerator)
    ran = f"{accelerated.teachers[0]}" + (", compiled" if accelerated.compiled else "")
    accelerator.print(f"teacher {asked.info.name}, {ran}")
    settings = {"views": views, "formats": (features, logits), "ran": ran, "device_batch_size": options.device_batch_size}
    write_cache(
        recipe,
        asked,
        sources,
        options.output,
        accelerator,
        shard_bytes=round(options.shard_mb * 1e6),
        **settings,
    )
    accelerator.end_training()


def grid(options: argparse.Namespace) -> None:
    """Runs a grid, or the rest of it."""
    from deit_kd.sweep import run_grid

    output = options.output or Path("runs") / f"grid_{recipes.run_folder(options.recipe).name}"
    run_grid(options.recipe, options.overrides, output, options.data, options.jobs)


def pack(options: argparse.Namespace) -> None:
    """Makes shards of an image folder."""
    from deit_kd.data.sources.pack import pack

    before = (
        "is there already, whole; " if pack(options.data, options.output, options.short_side, options.shard_mb * 1_000_000) else ""
    )
    print(for_terminal(f"{options.output}: {before}train with --data {options.output} data.source=shards"))


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


def _device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def convert(options: argparse.Namespace) -> None:
    """Makes a folder of an authors' file and tells what was in it."""
    from deit_kd.export import convert

    for line in convert(options.source, options.folder, options.class_names):
        print(for_terminal(line))


def export(options: argparse.Namespace) -> None:
    """Writes a student in another format."""
    from deit_kd.export.formats import export

    path, difference, before = export(options.weights, options.format, options.output)
    there = "is there already, whole; " if before else ""
    print(for_terminal(f"{path}: {there}logits differ by {difference:.1g} of the largest at most"))


def publish(options: argparse.Namespace) -> None:
    """Uploads a student."""
    from deit_kd.export.publish import publish

    settings = {"private": options.private, "dry_run": options.dry_run, "license": options.license}
    for line in publish(_run_of(options.run_folder), options.to, despite_teacher=options.despite_teacher, **settings):
        print(for_terminal(line))


def card(options: argparse.Namespace) -> None:
    """Writes a card again."""
    folder = _run_of(options.run_folder)
    if not (folder / "run.json").is_file() or not (folder / "student").is_dir():
        raise UserError(f"{options.run_folder}: is no run that came to its end; give a folder that train.py made")
    from deit_kd.export import write_card

    print(for_terminal(write_card(folder)))


def _run_of(folder: Path) -> Path:
    """The run, also where its student/ is named."""
    above = folder.resolve().parent
    is_student = folder.resolve().name == "student" and not (folder / "run.json").is_file() and (above / "run.json").is_file()
    return above if is_student else folder


def doctor(options: argparse.Namespace) -> None:
    """Prints a line a check; the exit code is that of the worst."""
    recipe = recipes.load(options.recipe, options.overrides)
    from deit_kd.distributed.accelerator import make_accelerator, plain_accelerator
    from deit_kd.models import build
    from deit_kd.profiling.doctor import SEVERITY, run_checks, verdict

    recipe, fault = build.resolve(recipe), None
    output = options.output or recipes.run_folder(options.recipe)
    try:
        try:
            accelerator = make_accelerator(recipe, options.device, output)
        except UserError as error:
            fault = str(error)
            accelerator = plain_accelerator(cpu=options.device != "cuda")  # the rest can be looked at all the same
    except (ValueError, RuntimeError) as error:  # WORLD_SIZE without a launcher, or a launcher that nobody else answers
        reason = fault or " ".join(str(error).split())[:200]
        raise UserError(f"processes do not find each other ({reason}); start them with a command of launch/README.md") from None
    lines = []
    for line in run_checks(recipe, options.data, output, accelerator, fault):
        accelerator.print(f"{line.severity:<5} {line.name:<11} {for_terminal(line.text)}", flush=True)
        lines.append(line)
    accelerator.print(verdict(lines))
    accelerator.end_training()
    sys.exit(max(SEVERITY[line.severity] for line in lines))


def plan(options: argparse.Namespace) -> None:
    """Prints what a recipe takes, on one device or on each of the table."""
    _may_write(options.json, "predicted")
    recipe = recipes.load(options.recipe, options.overrides)
    from deit_kd.profiling import forecast

    told = forecast.forecast(recipe, options.data, options.images, options.gpu, options.gpus, options.nodes)
    print(forecast.describe(told), flush=True)
    content = forecast.as_json(told)
    if options.measure:
        content["measured"] = forecast.measure(told, options.data, options.device, options.device_batch_size, options.steps)
        print("\n" + forecast.compare(content["measured"]))
    _write_json(options.json, content)


def bench(options: argparse.Namespace) -> None:
    """Prints where the time goes."""
    _may_write(options.json, "advice")
    recipe = recipes.load(options.recipe, options.overrides)
    from dataclasses import asdict

    import torch

    from deit_kd.profiling.advice import Machine, advise, bottleneck_of, describe
    from deit_kd.profiling.bench import StepBenchmark
    from deit_kd.profiling.bench import bench as run_bench

    benchmark = StepBenchmark(recipe, options.data, options.device, options.device_batch_size)
    timed = run_bench(benchmark, options.steps)
    machine = Machine(os.cpu_count() or 1, torch.get_num_threads(), torch.cuda.device_count(), benchmark.task.accumulation_steps)
    benchmark.accelerator.print(describe(recipe, timed, machine))
    if benchmark.accelerator.is_main_process:
        _write_json(options.json, asdict(timed) | {"wall": bottleneck_of(timed), "advice": advise(recipe, timed, machine)})
    benchmark.accelerator.end_training()


def _write_json(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        from deit_kd.files.outputs import replace, workspace
        from deit_kd.files.whole import write_json

        with workspace(file, "another deit-kd") as made:
            write_json(made, content)
            replace(made, file)


def _may_write(file: Path | None, key: str) -> None:
    """Refuses a file of others before any work; one with this key is ours, of before, and so is an empty one."""
    if file is None or not os.path.lexists(file) or (file.is_file() and file.stat().st_size == 0):
        return
    from deit_kd.files.documents import read_json

    remedy = "it is left alone; give another --json"
    if key not in read_json(file, dict[str, Any], f"which this command did not write; {remedy}"):
        raise UserError(f"--json {file}: holds something that this command did not write; {remedy}")
