"""How the networks of a run are executed: folded, laid out, compiled. What changes their outputs is measured and reported."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from deit_kd.errors import UserError
from deit_kd.files.atomic import write_json
from deit_kd.files.documents import MEGABYTE, read_json
from deit_kd.files.warn import optional
from deit_kd.models import AnyTeacher, Teacher
from deit_kd.models.folding import fold_batch_norms
from deit_kd.recipe import Run

ALLOWED = 1e-4  # relative error of features and logits that folding and layout may add in float32; they add 1e-5 and less
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # Accelerate's names
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class TeacherAcceleration:
    """How a teacher was accelerated. Errors are the norm of the change over the norm of the plain network's output in float32."""

    batch_norms_folded: int
    layout: str
    weights: str  # dtype
    feature_error: float
    logit_error: float

    def __str__(self) -> str:
        """For people."""
        folded = f"{self.batch_norms_folded} batch norms folded, " if self.batch_norms_folded else ""
        return (
            f"{folded}{self.layout}, {self.weights}; features differ by {self.feature_error:.1g}, logits by {self.logit_error:.1g}"
        )


@dataclass(frozen=True)
class Acceleration:
    """How the networks of a run were accelerated."""

    teachers: tuple[TeacherAcceleration | None, ...]  # each network once; None for one that is read from a cache
    compiled: str | None  # torch.compile's mode; None: they are not
    keeps_memory: bool = False


def prepare(
    run: Run, teachers: Sequence[AnyTeacher], example: Callable[[], Tensor], accelerator: Accelerator, sharded: bool = False
) -> Acceleration:
    """Accelerates the teachers of a run, and chooses the mode of torch.compile.

    Args:
        run: says what is wanted.
        teachers: on their device; changed in place.
        example: gives [B,3,H,W] of the data, normalized, to measure with.
        accelerator: knows the run's precision, and has one process choose for all.
        sharded: over FSDP2, whose hooks torch.compile was not tried with; `auto` leaves it out.

    Raises:
        UserError: what was asked for changes a teacher's outputs too much, or cannot be had here.
    """
    wanted = run.speed == "auto" and accelerator.device.type == "cpu" if run.keep_memory == "auto" else run.keep_memory
    kept = wanted and keep_memory()
    if run.keep_memory is True and not kept:
        raise UserError("run.keep_memory=true: only the C library of Linux, glibc, can do this; set run.keep_memory=auto")
    compiled = _compile_mode(run, accelerator.device, sharded)
    of_teacher = compiled if run.compile_teacher == "auto" else _mode(run.compile_teacher)
    networks = [each.live for each in dict.fromkeys(teachers)]
    images = example().to(accelerator.device) if any(networks) else torch.empty(0)
    quick = tuple(None if each is None else _quicken(each, run, images, accelerator) for each in networks)
    for each in networks:
        if of_teacher and each:
            each.compile_forward(of_teacher)
    return Acceleration(quick, compiled, kept)


def keep_memory() -> bool:
    """Keeps freed memory in this process. Otherwise glibc returns large tensors to the kernel, which zeroes their pages again at each step.

    Returns:
        Whether the C library can do this.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(trim_threshold, -1) == mallopt(mmap_max, 0) == 1


def _compile_mode(run: Run, device: torch.device, sharded: bool) -> str | None:
    chosen = run.compile
    if chosen == "auto":  # on a CPU it takes minutes; everywhere a C compiler
        has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
        has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()  # Triton compiles its launcher against them
        chosen = run.speed == "auto" and device.type == "cuda" and not sharded and has_compiler and has_headers
    return _mode(chosen)


def _mode(chosen: bool | str) -> str | None:
    """torch.compile's mode, and what goes with it; None for False."""
    if chosen is False:
        return None
    torch._inductor.config.fallback_random = True  # drop path draws what it draws without compilation
    torch._dynamo.config.recompile_limit = (
        64  # networks share code: each is another graph of one function, and beyond 8 all run eagerly
    )
    return "default" if chosen is True else chosen


@torch.inference_mode()
def _quicken(teacher: Teacher, run: Run, images: Tensor, accelerator: Accelerator) -> TeacherAcceleration:
    """Folds a teacher, chooses its memory format and precision, and undoes what changes its outputs too much."""
    plain = run.speed == "plain"
    reference = _exact(teacher, images)
    before, folded = teacher.model, 0
    if run.fold_teacher is True or (run.fold_teacher == "auto" and not plain):
        teacher.model = copy.deepcopy(before)
        folded = fold_batch_norms(teacher.model, partial(teacher.probe, images[:1]))
    low = teacher.dtype_once_folded
    if low is None and teacher.follows_autocast and not plain:
        low = HALF.get(accelerator.mixed_precision)
    layout = _layout(teacher, run, images, accelerator, low)
    teacher.lay_out(FORMATS[layout])
    error = _errors(_exact(teacher, images), reference)
    if not all(each <= ALLOWED for each in error):
        if run.fold_teacher is True or run.teacher_layout == layout != "contiguous":
            raise UserError(
                f"teacher {teacher.info.name}: folded and laid out {layout}, its outputs change by {max(error):.1g}, more than "
                f"{ALLOWED:g}; set run.fold_teacher=false and run.teacher_layout=contiguous"
            )
        teacher.model, folded, layout = before, 0, "contiguous"
        teacher.lay_out(FORMATS[layout])
        error = _errors(_exact(teacher, images), reference)
    if teacher.dtype_once_folded:
        error = _cast(teacher, teacher.dtype_once_folded, images, reference)
    elif low:  # instead of casting the weights again at each step, if that is as exact
        with accelerator.autocast():
            error = _errors(_outputs(teacher, images), reference)
        exact = copy.deepcopy(teacher.model)
        ours = _cast(teacher, low, images, reference)
        if all(each <= 1.5 * max(error) for each in ours):
            error = ours
        else:
            teacher.model = exact
            teacher.use(torch.float32, follows_autocast=True)
    if not math.isfinite(sum(error)):
        raise UserError(f"teacher {teacher.info.name}: its outputs are not finite in half precision; set teacher.precision=float32")
    return TeacherAcceleration(folded, layout, str(teacher.dtype).removeprefix("torch."), *error)


def _cast(teacher: Teacher, dtype: torch.dtype, images: Tensor, reference: tuple[Tensor, Tensor]) -> tuple[float, float]:
    teacher.use(dtype)
    return _errors(_outputs(teacher, images), reference)


def _layout(teacher: Teacher, run: Run, images: Tensor, accelerator: Accelerator, low: torch.dtype | None) -> str:
    if run.teacher_layout != "auto":
        return run.teacher_layout
    if run.speed == "plain" or not any(
        isinstance(each, nn.Conv2d) and each.kernel_size != each.stride for each in teacher.modules()
    ):
        return "contiguous"
    if images.device.type == "cpu":
        return "channels_last"
    chosen = [""]
    if accelerator.is_main_process:
        trial = copy.deepcopy(teacher)
        if low:
            trial.use(low)
        chosen = [_faster(trial, images.repeat(16, 1, 1, 1))]
    broadcast_object_list(chosen)  # equal on all processes
    return chosen[0]


def _faster(teacher: Teacher, images: Tensor) -> str:
    """The memory format in which this GPU runs this teacher faster, timed once and cached: grouped convolutions differ by up to 5 times."""
    file = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deit_kd" / "teacher_layout.json"
    key = (
        f"{teacher.info.sha256[:16]} {tuple(images.shape)} {teacher.dtype} {torch.cuda.get_device_name()} torch {torch.__version__}"
    )
    known = _known_layouts(file)
    if key not in known:
        seconds = {}
        for layout in FORMATS:
            teacher.lay_out(FORMATS[layout])
            for repeat in range(13):
                if repeat == 3:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                teacher(images)
            torch.cuda.synchronize()
            seconds[layout] = time.perf_counter() - start
        known[key] = min(seconds, key=lambda layout: seconds[layout])
        with optional(f"remembering layouts of teachers in {file}"):  # else they are measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known, 1)
    return known[key]


def _known_layouts(file: Path) -> dict[str, str]:
    """The timings of earlier runs; empty if the file is missing or damaged."""
    try:
        return dict(read_json(file, dict[str, Literal["contiguous", "channels_last"]], "it is measured again", MEGABYTE))
    except UserError:
        return {}


def _exact(teacher: Teacher, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features, logits) in float32, without autocast and TF32."""
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if images.device.type == "cuda" else nullcontext()
    with exact, torch.autocast(images.device.type, enabled=False):
        return _outputs(teacher, images)


def _outputs(teacher: Teacher, images: Tensor) -> tuple[Tensor, Tensor]:
    output = teacher(images)
    return output.features, output.logits


def _errors(ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[float, float]:
    errors = [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(ours, reference, strict=True)]
    return errors[0], errors[1]


def compiled_graphs() -> dict[str, int]:
    """How many graphs torch.compile made so far, how many graph breaks it met, and how many graphs it recompiled."""
    counters = torch._dynamo.utils.counters
    compilations = [str(each.compile_id) for each in torch._dynamo.utils.get_compilation_metrics()]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompilations": sum(not each.endswith("/0") for each in compilations),
    }
