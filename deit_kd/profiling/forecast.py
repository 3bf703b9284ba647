"""`deit-kd plan`: compute, memory and hours of a recipe from counts and the roofline, as text and JSON; and the time of some steps measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from deit_kd.data import Source
from deit_kd.data.build import open_data
from deit_kd.data.on_device.augment import choose_augmentation
from deit_kd.errors import UserError
from deit_kd.models import build
from deit_kd.models.summary import Plan
from deit_kd.profiling import devices, roofline
from deit_kd.profiling.bench import StepBenchmark, image_seconds
from deit_kd.profiling.devices import GPUS, Device
from deit_kd.profiling.operations import Operation, StepCost, count_operations
from deit_kd.profiling.roofline import Prediction, Training
from deit_kd.recipe import Recipe
from deit_kd.tasks.setup import FEW_IMAGES

IMAGENET_IMAGES, IMAGENET_VAL_IMAGES = 1_281_167, 50_000
IMAGENET_FILE_BYTES = 110e3  # 140 GB over as many files
# Of one core for an image of ImageNet's usual size, cut from photographs (JPEG of 500 x 375, 50 kB, quality 90): all augmentation in the worker,
# and only decoding, crop and flip there. On an AMD EPYC core; results/speed_data.json.
IMAGENET_CORE_SECONDS: dict[str, float] = {"cpu": 1 / 210, "device": 1 / 622}


_Place: TypeAlias = Literal["cpu", "device"]


@dataclass(frozen=True)
class Forecast:
    """A recipe's counts and predictions."""

    recipe: Recipe
    plan: Plan
    half: StepCost  # with autocast, as a GPU works
    full: StepCost  # in float32, as a CPU works
    predictions: tuple[Prediction, ...]
    train_images: int
    val_images: int
    images_from: str  # where these numbers are from
    core_seconds: tuple[float, float]  # of one core for one image, for a run on a CPU and on a GPU; nan: not known
    core_seconds_from: str


def forecast(recipe: Recipe, data: Path | None, images: int | None, gpu: str | None, gpus: int, nodes: int) -> Forecast:
    """Counts a recipe's work and predicts its time on devices.

    Args:
        recipe: what would be trained.
        data: its folder; None for as many images as are stated, or ImageNet's.
        images: of an epoch, where there are no data.
        gpu: a name; None for all devices.
        gpus: processes of a machine.
        nodes: machines.

    Raises:
        UserError: an unknown device, data that are not there, a number of images that nothing states, or a batch that does not divide.
    """
    chosen = [devices.find_device(gpu)] if gpu else [*GPUS.values(), devices.this_cpu()]
    recipe = build.resolve(recipe)
    classes, core_seconds, core_from = None, (math.nan, math.nan), "pass --data to measure it"
    if data or (recipe.data.source == "fashion_mnist" and images is None):
        train, val = open_data(recipe.data, data)
        train_images, val_images, images_from, classes = len(train), len(val), train.origin, len(train.class_names)
        core_seconds, core_from = _core_seconds(train, recipe), "measured on this machine"
    else:
        train_images, val_images, images_from = _stated(recipe, images)
        if "ImageNet" in images_from:
            on_cpu, on_gpu = (IMAGENET_CORE_SECONDS[place] for place in _augments_on(recipe))
            core_seconds, core_from = (on_cpu, on_gpu), "of photographs on an AMD EPYC core; pass --data to measure yours"
    plan, training = build.make_plan(recipe, classes), training_of(recipe)
    half, full = (count_step(recipe, classes, half=each) for each in (True, False))
    sizes = {"train_images": train_images, "val_images": val_images, "gpus": gpus, "nodes": nodes}
    predictions: list[Prediction] = []
    for device in chosen:
        work = half if device.is_gpu else full
        if gpu is None and not roofline.largest_batch(training, plan, work, device):
            continue
        predictions += [
            roofline.predict(training, plan, work, device, compiled=compiled, **sizes)
            for compiled in ((False, True) if device.is_gpu else (False,))
        ]
    return Forecast(recipe, plan, half, full, tuple(predictions), train_images, val_images, images_from, core_seconds, core_from)


def training_of(recipe: Recipe) -> Training:
    """What the roofline must know of a recipe."""
    return Training(
        img_size=recipe.data.img_size,
        global_batch_size=recipe.global_batch_size,
        epochs=recipe.epochs,
        eval_every_epochs=recipe.run.eval_every_epochs,
        has_ema=bool(recipe.ema_decay),
        moments=1 if recipe.optim.momentum is not None else 2,
        augments=recipe.augmentation.auto_augment is not None and recipe.run.augment_on != "cpu",
    )


def count_step(recipe: Recipe, num_classes: int | None, half: bool) -> StepCost:
    """The work of a step of the recipe, at its image size.

    Args:
        recipe: what would be trained.
        num_classes: of the data; None for the teacher's own number.
        half: with bfloat16 autocast, as on a GPU, casts included; else float32.

    Raises:
        UserError: as `build.build_models`.
    """
    recipe = build.resolve(recipe)
    _, teachers, distiller = build.build_models(recipe, num_classes)
    # On a GPU teachers are not folded: the published rates that give its efficiency are of teachers as timm builds them.
    folds = recipe.run.fold_teacher is True or (recipe.run.fold_teacher == "auto" and recipe.run.speed == "auto")
    return count_operations(distiller, teachers, recipe.distillations(), recipe.data.img_size, folds and not half, half)


def _core_seconds(train: Source, recipe: Recipe) -> tuple[float, float]:
    """Seconds of one core for an image, in a run on a CPU and in one on a GPU."""
    cpu, places = torch.device("cpu"), _augments_on(recipe)
    seconds = {}
    for place in sorted(set(places)):
        decoded = recipe.run.decode_on if place == "device" else "workers"
        here = replace(recipe, run=replace(recipe.run, augment_on=place, decode_on=decoded))
        seconds[place] = sum(image_seconds(train, here, cpu))
    return seconds[places[0]], seconds[places[1]]


def _augments_on(recipe: Recipe) -> tuple[_Place, _Place]:
    """Where a run on a CPU and one on a GPU augment, by `run.augment_on`: cpu or device."""
    if recipe.run.augment_on != "auto":
        return recipe.run.augment_on, recipe.run.augment_on
    try:
        on_device = replace(recipe.run, augment_on="device", decode_on="workers")
        choose_augmentation(recipe.data, recipe.augmentation, on_device, torch.device("cpu"))
    except UserError:
        return "cpu", "cpu"
    return "cpu", "device"


def _stated(recipe: Recipe, images: int | None) -> tuple[int, int, str]:
    if images is not None:
        return images, 0, "as --images says; evaluation is not counted"
    if isinstance(recipe.data.train_images, int):
        return recipe.data.train_images, 0, "as the recipe says; evaluation is not counted"
    if recipe.finetune is None and recipe.data.num_classes in ("auto", 1000) and recipe.data.img_size >= 160:
        return IMAGENET_IMAGES, IMAGENET_VAL_IMAGES, "ImageNet-1k's, assumed: neither --data nor --images is given"
    raise UserError("deit-kd plan: how many images an epoch has is not stated; pass --data DIR or --images N")


def as_json(found: Forecast) -> dict[str, Any]:
    """All numbers of the text, and more, in bytes and seconds."""
    batches = [1 << n for n in range(5, 11)]
    return {
        "recipe": found.recipe.student.name,
        "train_images": found.train_images,
        "val_images": found.val_images,
        "images_from": found.images_from,
        "counts": asdict(found.plan)
        | {"checkpoint_bytes": found.plan.checkpoint_bytes, "gradient_bytes": found.plan.gradient_bytes},
        "per_image": {name: _per_image(work) for name, work in (("half", found.half), ("float32", found.full))},
        "memory_bytes_by_batch": {
            name: {batch: roofline.memory_bytes(training_of(found.recipe), found.plan, work, batch) for batch in batches}
            for name, work in (("half", found.half), ("float32", found.full))
        },
        "cache_bytes": roofline.cache_bytes(found.plan, _views(found)) if found.plan.teachers else {},
        "core_seconds_per_image": {
            on: None if math.isnan(seconds) else seconds for on, seconds in zip(("cpu", "gpu"), found.core_seconds, strict=True)
        },
        "predicted": [
            asdict(each) | {"step_seconds": each.step_seconds, "cores": _cores(found, each)} for each in found.predictions
        ],
    }


def _per_image(work: StepCost) -> dict[str, float]:
    passes = {"teacher": work.teacher, "student_forward": work.student_forward, "student_backward": work.student_backward}
    counts = {f"{name}_flops": sum(each.flops for each in found) for name, found in passes.items()}
    counts |= {f"{name}_bytes": sum(each.bytes_per_image for each in found) for name, found in passes.items()}
    return counts | {"saved_bytes": work.saved_bytes_per_image}


def _views(found: Forecast) -> int:
    first = found.predictions[0]
    return first.steps * min(found.recipe.global_batch_size, found.train_images)


def _cores(found: Forecast, prediction: Prediction) -> int | None:
    seconds = found.core_seconds[prediction.device != "cpu"]
    return None if math.isnan(seconds) else math.ceil(prediction.images_per_second * seconds)


def describe(found: Forecast) -> str:
    """The text: counts, then memory and disk, then a table of devices."""
    recipe, training, plan, first = found.recipe, training_of(found.recipe), found.plan, found.predictions[0]
    views = _views(found)
    student = (*found.half.student_forward, *found.half.student_backward)
    operations = (_sum(student, "flops") + (0 if plan.cached else _sum(found.half.teacher, "flops"))) * views
    batches = [1 << n for n in range(5, 11)]
    kept = recipe.run.keep_checkpoints + 1
    checkpoint = plan.checkpoint_bytes + (4 * plan.student_parameters if recipe.ema_decay else 0)
    lines = [
        f"run        {recipe.epochs} epochs of {found.train_images:,} images ({found.images_from}), {recipe.global_batch_size} a step: "
        f"{first.steps:,} steps, {operations / 1e15:,.3g} PFLOP",
        f"student    {recipe.student.name}  {plan.student_parameters:,} parameters, projector {plan.projector_parameters:,}; an image takes "
        f"{_sum(student, 'flops') / 1e9:.3g} GFLOP and moves {_sum(student, 'bytes_per_image') / 1e6:.3g} MB, forward and backward",
        *(
            f"teacher    {name}  {parameters:,} parameters; an image takes {2 * gmacs:.3g} GFLOP"
            for name, parameters, gmacs in plan.teachers
        ),
        f"memory     {found.half.saved_bytes_per_image / 1e6:.3g} MB of activations an image with autocast, "
        f"{found.full.saved_bytes_per_image / 1e6:.3g} in float32, beside "
        f"{roofline.state_bytes(training, plan, found.half) / 1e9:.3g} GB of weights, gradients, moments and teacher",
        "  batch    " + "".join(f"{batch:>9}" for batch in batches),
        "  GB       "
        + "".join(f"{roofline.memory_bytes(training, plan, found.half, batch) / 1e9:>9.3g}" for batch in batches)
        + "   with autocast; predicted",
        f"disk       {kept} checkpoints of {checkpoint / 1e6:.0f} MB, one while it is written",
        *_cache_lines(found, views),
        *(
            [
                f"network    a device sends and receives {first.all_reduce_bytes / 1e6:.3g} MB of gradients a step and gathers "
                f"{first.gather_bytes / 1e6:.3g} MB for losses of the whole batch"
            ]
            if first.processes > 1
            else []
        ),
        "data       "
        + (
            "the cores they need: "
            if math.isnan(sum(found.core_seconds))
            else "{:.3g} images/s of one core for a run on a CPU, {:.3g} on a GPU, ".format(
                *(1 / each for each in found.core_seconds)
            )
        )
        + found.core_seconds_from
        + (f"; {IMAGENET_FILE_BYTES / 1e3:.0f} kB an image" if "ImageNet" in found.images_from else ""),
        "",
        f"Predicted, not measured here: {first.processes} device{'s' if first.processes > 1 else ''}, if data keep up; "
        "peaks are the vendors', the share of them that is reached from others' published rates (deit_kd/profiling/roofline.py), data center GPUs not among them. "
        "Expect to be a third off, more for small networks.",
        f"{'device':<16}{'batch':>10}{'fits':>7}{'GB':>7}{'teacher ms':>12}{'student':>9}{'network':>9}{'images/s':>10}{'cores':>7}"
        f"{'hours':>10}{'device-hours':>14}",
        *(_row(found, each) for each in found.predictions),
        *_host_lines(found.predictions),
    ]
    return "\n".join(lines)


def _row(found: Forecast, each: Prediction) -> str:
    name = each.device + (" compiled" if each.compiled else "")
    batch = f"{each.accumulation_steps} x {each.device_batch}"
    network = 1000 * (each.all_reduce_seconds + each.gather_seconds)
    return (
        f"{name:<16}{batch:>10}{each.largest_batch:>7}{each.memory_bytes / 1e9:>7.3g}{1000 * each.teacher_seconds:>12.3g}"
        f"{1000 * each.student_seconds:>9.3g}{network:>9.3g}{each.images_per_second:>10,.0f}{_cores(found, each) or '?':>7}"
        f"{each.hours:>10,.3g}{each.device_hours:>14,.3g}"
    )


def _host_lines(predictions: Sequence[Prediction]) -> list[str]:
    """The devices that would wait for their host, and what to change."""
    bound = [each for each in predictions if each.is_host_bound]
    if not bound:
        return []
    names = ", ".join(
        f"{each.device}{' compiled' if each.compiled else ''} ({1000 * (each.teacher_seconds + each.student_seconds):.3g} ms of work, "
        f"{1000 * each.host_seconds:.3g} ms of launches)"
        for each in bound
    )
    return [f"bound by launches, not by the device: {names}; {FEW_IMAGES}"]


def _sum(operations: tuple[Operation, ...], field: str) -> float:
    return float(sum(getattr(each, field) for each in operations))


def _cache_lines(found: Forecast, views: int) -> list[str]:
    """A cache of every view of the run, and of 16 views an image."""
    if not found.plan.teachers:
        return []
    few = min(views, 16 * found.train_images)
    return [
        f"  cache    {count:,} views: "
        + ", ".join(f"{name} {_size(size)}" for name, size in roofline.cache_bytes(found.plan, count).items())
        for count in dict.fromkeys((views, few))
    ]


def _size(count: float) -> str:
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= unit or name == "MB")
    return f"{count / unit:.3g} {name}"


def measure(found: Forecast, data: Path | None, device: str, device_batch_size: int | None, steps: int) -> dict[str, Any]:
    """Times steps of the real loop on this machine; returns them beside the prediction.

    Raises:
        UserError: as train.py.
    """
    benchmark = StepBenchmark(found.recipe, data, device, device_batch_size)
    kind, processes = benchmark.accelerator.device.type, benchmark.accelerator.num_processes
    here: Device | None = devices.device_here(kind)
    measured = benchmark.time(steps)
    predicted = None
    if here is not None:
        predicted = roofline.predict(
            training_of(found.recipe),
            found.plan,
            found.half if here.is_gpu else found.full,
            here,
            train_images=len(benchmark.loader.source),
            gpus=processes,
            device_batch=benchmark.loader.micro_batch_size,
        )
    total = found.recipe.epochs * benchmark.loader.steps_per_epoch
    benchmark.accelerator.end_training()
    return {
        "device": kind if here is None else here.name,
        "processes": processes,
        "steps": steps,
        "images_per_second": benchmark.loader.global_batch_size / measured["whole"],
        "seconds": measured,
        "hours": total * measured["whole"] / 3600,
        "predicted": None if predicted is None else asdict(predicted) | {"step_seconds": predicted.step_seconds},
    }


def compare(measured: dict[str, Any]) -> str:
    """A table of measured and predicted milliseconds a step."""
    seconds, predicted = measured["seconds"], measured["predicted"]
    lines = [
        f"Measured: {measured['steps']} steps on {measured['processes']} x {measured['device']}, {measured['images_per_second']:,.3g} images/s "
        f"with the data; the whole recipe, without its evaluations, takes {measured['hours']:,.3g} hours at this rate",
        f"{'ms a step':<12}{'measured':>10}{'predicted':>11}",
    ]
    pairs = [("teacher", seconds["teacher"], "teacher_seconds"), ("student", seconds["student"], "student_seconds")]
    pairs += [("data", seconds["data"], ""), ("step", seconds["whole"], "step_seconds")]
    for name, value, key in pairs:
        lines.append(f"{name:<12}{1000 * value:>10.4g}" + (f"{1000 * predicted[key]:>11.4g}" if predicted and key else f"{'':>11}"))
    return "\n".join(lines)
