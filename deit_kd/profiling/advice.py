"""Advice from a benchmark: which part is the bottleneck, and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deit_kd.data.workers import cores
from deit_kd.profiling.bench import Bench, StepBenchmark

SMALL_SHARE = 0.15  # of a step; less than this is not worth a change


@dataclass(frozen=True)
class Conditions:
    """What advice depends on beside the benchmark."""

    cores: int  # that this process may use
    threads: int  # that torch computes with, in each process on a CPU
    gpus: int  # that torch sees
    accumulation_steps: int
    source: str  # data.source of the recipe
    img_size: int  # pixels a side
    precision: str  # run.precision
    has_several_teachers: bool  # there is no cache for these


def conditions_of(benchmark: StepBenchmark) -> Conditions:
    """The conditions of this machine and the benchmark's recipe."""
    recipe = benchmark.recipe
    return Conditions(
        cores=cores(),
        threads=torch.get_num_threads(),
        gpus=torch.cuda.device_count(),
        accumulation_steps=benchmark.task.accumulation_steps,
        source=recipe.data.source,
        img_size=recipe.data.img_size,
        precision=recipe.run.precision,
        has_several_teachers=bool(recipe.teachers),
    )


def data_seconds(bench: Bench) -> float:
    """Seconds that data cost a step: the wait for them, or the delay by workers that share its cores."""
    core = (bench.read + bench.transform) * bench.images_per_step / bench.processes if bench.workers else 0.0
    slowed = min(bench.whole - bench.step_only, core) if bench.device == "cpu" and not math.isnan(core) else 0.0
    return max(bench.wait, slowed)


def bottleneck_of(bench: Bench) -> str:
    """data, communication, teacher or student: where most of the time is that could be saved."""
    if data_seconds(bench) > SMALL_SHARE * bench.whole:
        return "data"
    if bench.all_reduce + bench.gather > 2 * SMALL_SHARE * bench.step_only:
        return "communication"
    return "teacher" if bench.teacher > bench.student else "student"


def advise(bench: Bench, conditions: Conditions) -> list[str]:
    """Changes that would widen the bottleneck, the most promising first; only those that this run does not have yet."""
    advice = {"data": _on_data, "communication": _on_communication, "teacher": _on_teacher, "student": _on_student}
    given = advice[bottleneck_of(bench)](bench, conditions)
    if bench.device == "cuda" and bench.processes < conditions.gpus:
        given.append(f"{bench.processes} of {conditions.gpus} GPUs work: launch a process for each (launch/README.md)")
    return given


def _on_data(bench: Bench, conditions: Conditions) -> list[str]:
    image = bench.read + bench.transform
    busy = conditions.threads if bench.device == "cpu" else 1
    spare = max(0, conditions.cores // bench.processes - busy)
    # Where images wait and do not compute (a slow disk or network), more workers than cores help.
    most = 32 if bench.read > 3 * bench.transform else spare
    needed = max(1, math.ceil(max(1, bench.workers) * bench.data_only / bench.step_only))
    given = []
    if bench.workers < min(needed, most):
        given.append(
            f"run.workers={min(needed, most)}: with {bench.workers} the loader alone takes {1000 * bench.data_only:.3g} ms a step"
        )
    if needed > most:
        given.append(f"{needed} cores keep up with the step and {spare} are free here: take more of them, or cheaper images")
    if bench.transform > bench.read and bench.device == "cuda" and bench.augments_on != "device":
        given.append(f"run.augment_on=device: {bench.transform / image:.0%} of an image's cost is its augmentation")
    if bench.read >= bench.transform and conditions.source in ("image_folder", "shards", "hf_datasets"):
        given.append(
            f"deit-kd pack --short-side {round(conditions.img_size * 8 / 7)}: {bench.read / image:.0%} of an image's cost is reading "
            "it; smaller files are read faster (the images change a little, and small crops are blurred)"
        )
    return given or ["the loader alone keeps up: beside the step it lacks cores; lower OMP_NUM_THREADS, or take more cores"]


def _on_communication(bench: Bench, conditions: Conditions) -> list[str]:
    given = [
        "fewer processes, or a larger global_batch_size (with its learning rate): each step sends the same "
        f"{1000 * bench.all_reduce:.3g} ms of gradients whatever its batch"
    ]
    if conditions.accumulation_steps > 1:
        given.append("a larger --device-batch-size: fewer gathers a step")
    if bench.gather > bench.all_reduce:
        given.append("batch_statistics=device spares the gather, and makes the number of devices a part of the method")
    return given


def _on_teacher(bench: Bench, conditions: Conditions) -> list[str]:
    given = _compute(bench, conditions)
    without = bench.step_only / max(bench.step_only - bench.teacher, 1e-9)
    if not conditions.has_several_teachers:
        given.append(
            f"deit-kd cache-teacher, and teacher.cache: a second student on the same views does not ask the teacher, and takes 1/{without:.1f} of the time"
        )
    given.append("a smaller teacher.img_size: fewer operations, but other targets; try it as an ablation")
    return given


def _on_student(bench: Bench, conditions: Conditions) -> list[str]:
    given = _compute(bench, conditions)
    if conditions.accumulation_steps > 1:
        given.append("a larger --device-batch-size, if memory allows: a global batch in pieces runs the student twice")
    free = conditions.cores - (conditions.threads + bench.workers) * bench.processes
    if bench.device == "cpu" and free > 0:
        given.append(
            f"{free} of {conditions.cores} cores compute nothing: launch more processes (launch/cpu2.yaml), or raise OMP_NUM_THREADS"
        )
    return given


def _compute(bench: Bench, conditions: Conditions) -> list[str]:
    given = []
    if bench.device == "cuda" and bench.compiled is None:
        given.append("run.compile=true: fewer passes over memory, which bounds both networks on current GPUs")
    if bench.device == "cuda" and conditions.precision == "no":
        given.append("run.precision=bf16: half the bytes and faster matrix products")
    return given


def describe(bench: Bench, conditions: Conditions) -> str:
    """A table of seconds and a paragraph."""
    images = bench.images_per_step
    rows = [
        ("end to end", bench.whole),
        ("  waiting for data", bench.wait),
        ("the same batch again and again", bench.step_only),
        ("  teacher", bench.teacher),
        ("  student, optimizer", bench.student),
        ("  the rest", max(0.0, bench.step_only - bench.teacher - bench.student)),
        ("the loader alone", bench.data_only),
    ]
    if bench.processes > 1:
        rows += [("all-reduce of gradients alone", bench.all_reduce), ("gather for losses alone", bench.gather)]
    lines = [
        f"{bench.processes} x {bench.device}, {bench.workers} workers each, {images} images a step, {bench.steps} steps a pass, medians",
        f"{'':<32}{'ms a step':>11}{'images/s':>11}",
        *(f"{name:<32}{1000 * value:>11.1f}" + (f"{images / value:>11.0f}" if value else "") for name, value in rows),
        f"an image takes {1000 * bench.read:.2f} ms of a core to read and {1000 * bench.transform:.2f} ms to augment",
        "",
    ]
    bottleneck = {
        "data": f"The bottleneck is the data: they cost {data_seconds(bench) / bench.whole:.0%} of a step.",
        "communication": f"The bottleneck is communication: by itself it takes {(bench.all_reduce + bench.gather) / bench.step_only:.0%} of a step.",
        "teacher": f"The bottleneck is the teacher: {bench.teacher / bench.step_only:.0%} of a step without data.",
        "student": f"The bottleneck is the student: {bench.student / bench.step_only:.0%} of a step without data.",
    }[bottleneck_of(bench)]
    pace = f"End to end runs at {bench.step_only / bench.whole:.0%} of the speed without data."
    given = advise(bench, conditions)
    return "\n".join([*lines, " ".join([bottleneck, pace]), *(f"- {line}" for line in given or ["nothing to change was found"])])
