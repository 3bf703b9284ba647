"""Verbs that prepare data and teachers: shards, class means, a cache of the teacher's answers."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from deit_kd import recipe as recipes
from deit_kd.cli.command_line import bounded, recipe_options
from deit_kd.errors import UserError
from deit_kd.text import for_terminal

MOST_VIEWS = 100_000


def _add_pack(verbs: Any) -> None:
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


def pack(options: argparse.Namespace) -> None:
    """Makes shards of an image folder."""
    from deit_kd.data.sources.pack import pack

    before = (
        "is there already, whole; " if pack(options.data, options.output, options.short_side, options.shard_mb * 1_000_000) else ""
    )
    print(for_terminal(f"{options.output}: {before}train with --data {options.output} data.source=shards"))


def _add_class_means(verbs: Any) -> None:
    verb = verbs.add_parser("class-means", help="the teacher's class means over the training images, for norm_direction")
    recipe_options(verb)
    verb.add_argument("--output", type=Path, required=True, help="the file to write, .safetensors")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.set_defaults(run=class_means)


def class_means(options: argparse.Namespace) -> None:
    """Computes a file of class means, or checks the one that is there."""
    recipe = recipes.load(options.recipe, options.overrides)
    distillations = [distillation for distillation in recipe.distillations() if distillation.distill.class_means is not None]
    if len({distillation.teacher for distillation in distillations}) != 1:
        raise UserError(
            f"recipe {options.recipe}: {'no' if not distillations else 'more than one'} teacher's class means are read in it"
        )
    from accelerate.utils import broadcast_object_list

    from deit_kd.data.build import example_images, loader_config, open_data
    from deit_kd.distributed.accelerator import on_cpu, plain_accelerator
    from deit_kd.files.outputs import must_not_be_data, settle, workspace
    from deit_kd.models import build
    from deit_kd.teacher_cache.class_means import load_or_compute
    from deit_kd.training import acceleration

    must_not_be_data(options.output, options.data)
    accelerator = plain_accelerator(on_cpu(options.device))
    source, val = open_data(recipe.data, options.data)
    teachers = build.build_teachers(recipe, source.class_names)
    teacher = teachers[recipe.distillations().index(distillations[0])].to(accelerator.device)
    acceleration.prepare(recipe.run, [teacher], partial(example_images, val, recipe.data, recipe.evaluation), accelerator)
    placed = loader_config(recipe.data, recipe.run, accelerator, lambda text: accelerator.print(for_terminal(text)))
    output = options.output
    with workspace(output, "deit-kd class-means") if accelerator.is_main_process else nullcontext() as made:
        file = [output if made is None or os.path.lexists(output) else made]
        broadcast_object_list(file)  # one process looks
        means = load_or_compute(
            file[0], recipe.data, recipe.augmentation, teacher, source, accelerator, placed, recipe.global_batch_size
        )
        if made is not None and file[0] == made:
            settle(made, output)
    accelerator.print(f"{options.output}: {means.shape[0]} classes x {means.shape[1]}; pass distill.class_means={options.output}")


def _add_cache_teacher(verbs: Any) -> None:
    verb = verbs.add_parser(
        "cache-teacher",
        help="what the teacher says of the training images, written down for the next students",
        epilog="example: deit-kd cache-teacher deit_ti --data IMAGENET --output caches/regnety --views 50 --features int8 --logits top:100",
    )
    recipe_options(verb)
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
    from deit_kd.data.build import example_images, open_data
    from deit_kd.distributed.accelerator import make_accelerator
    from deit_kd.files.outputs import must_not_be_data
    from deit_kd.models import build
    from deit_kd.teacher_cache.write import write_cache
    from deit_kd.training import acceleration

    must_not_be_data(options.output, options.data)
    compared = [distillation.distill for distillation in recipe.distillations()]
    features = options.features or ("bf16" if any(distill.feature_weight for distill in compared) else "none")
    logits = options.logits or ("full" if any(distill.kd_weight for distill in compared) else "none")
    accelerator = make_accelerator(recipe.run, recipe.optim.clip_grad, options.device, options.output)
    with accelerator.main_process_first():
        sources = open_data(recipe.data, options.data)
    asked = build.build_teachers(recipe, sources[0].class_names)[0].live
    assert asked, "no cache was stated"
    example = partial(example_images, sources[1], recipe.data, recipe.evaluation)
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


VERBS = (_add_pack, _add_class_means, _add_cache_teacher)
