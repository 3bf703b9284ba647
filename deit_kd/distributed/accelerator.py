"""The processes of a run, how they were launched, and the variables of their environment that change numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from deit_kd.errors import UserError
from deit_kd.recipe import Run
from deit_kd.text import lines_for_terminal


class Speaking(Accelerator):
    """Accelerate, which makes names of others safe for a terminal."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """On the main process alone; see `text.for_terminal`."""
        super().print(*(lines_for_terminal(each) for each in args), **kwargs)


@dataclass(frozen=True)
class _Variable:
    """A variable of the environment that asks for other numbers than the recipe: refused unless it agrees."""

    agrees: Callable[[str, float | None, str], bool]  # its value in lower case, optim.clip_grad, the precision that runs
    remedy: str


def _off(value: str, *_: Any) -> bool:
    return value in ("", "0", "no", "none", "false", "off", "n", "f")


_STRATEGY = "checkpoints do not know it: use launch/ddp8.yaml, or launch/fsdp2.yaml"
# `accelerate launch` and its configuration files set many of these always: a value that agrees, or asks for nothing, passes.
REFUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _Variable(
        lambda value, *_: value in ("", "1"), "a step is the recipe's global_batch_size; --device-batch-size says how it is cut"
    ),
    "ACCELERATE_MIXED_PRECISION": _Variable(
        lambda value, _, precision: _off(value) or value == precision,
        "set run.precision (auto, no, bf16, fp16), and leave out --mixed_precision and mixed_precision of the launcher",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": _Variable(
        lambda value, clip_grad, _: _off(value) or value == "auto" or _is(value, clip_grad), "set optim.clip_grad"
    ),
    "ACCELERATE_DYNAMO_BACKEND": _Variable(_off, "set run.compile, and leave out dynamo_backend of the launcher"),
    "ACCELERATE_DOWNCAST_BF16": _Variable(_off, "it is for TPUs; set run.precision"),
    "ACCELERATE_USE_DEEPSPEED": _Variable(_off, _STRATEGY),
    "ACCELERATE_USE_MEGATRON_LM": _Variable(_off, _STRATEGY),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _Variable(_off, _STRATEGY),
}
# These change roundings, and nothing that a recipe states: they are printed and kept in run.json.
RECORDED = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "TIMM_FUSED_ATTN", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"),
    *("TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "TORCH_CUDNN_V8_API_DISABLED", "PYTORCH_JIT", "NCCL_ALGO", "NCCL_PROTO"),
)


def environment() -> dict[str, str]:
    """The variables that are set and change roundings."""
    return {name: os.environ[name] for name in RECORDED if os.environ.get(name)}


def must_agree(clip_grad: float | None, precision: str) -> None:
    """Refuses variables that would change a run's numbers against its recipe.

    Args:
        clip_grad: the recipe's `optim.clip_grad`.
        precision: the one that runs: no, bf16 or fp16.

    Raises:
        UserError: a variable does.
    """
    for name, variable in REFUSED.items():
        value = os.environ.get(name, "")
        if not variable.agrees(value.strip().lower(), clip_grad, precision):
            asked = name.removeprefix("ACCELERATE_USE_")
            what = f"the launcher asks for {asked} ({name}={value!r})" if asked != name else f"{name}={value!r} is set"
            raise UserError(f"{what}, which contradicts the recipe; {variable.remedy}, or unset it")


def _is(value: str, number: float | None) -> bool:
    try:
        return number is not None and float(value) == number
    except ValueError:
        return False


def on_cpu(device: str) -> bool:
    """Whether a run is on the CPU: it was asked to, the launcher was, or there is no GPU.

    Raises:
        UserError: a GPU is asked for that is not there, or while the launcher uses the CPU.
    """
    launched = not _off(os.environ.get("ACCELERATE_USE_CPU", "").strip().lower())
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a driver and a CUDA build of torch"
        )
    if device == "cuda" and launched:
        raise UserError("--device cuda, but the launcher says ACCELERATE_USE_CPU; leave out use_cpu there, or --device here")
    cpu = device == "cpu" or launched or not torch.cuda.is_available()
    place = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
    if place and place.partition(":")[0] != ("cpu" if cpu else "cuda"):
        raise UserError(f"ACCELERATE_TORCH_DEVICE={place!r} is set, but the run is on {'the CPU' if cpu else 'a GPU'}; unset it")
    return cpu


def precision_of(stated: str, cpu: bool) -> str:
    """The precision that a run has, no, bf16 or fp16, where the recipe says `stated`.

    Raises:
        UserError: a CPU cannot train in it.
    """
    if stated == "fp16" and cpu:
        raise UserError("run.precision=fp16: a CPU has no fp16 training; use bf16, no or auto")
    if stated != "auto":
        return stated
    return "bf16" if not cpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def plain_accelerator(cpu: bool, precision: str = "no", **settings: Any) -> Accelerator:
    """An Accelerator that takes precision, accumulation and compilation from no variable of the environment."""
    once = GradientAccumulationPlugin(num_steps=1)  # the number alone would yield to the environment's
    handlers = [
        # Processes wait while the first one downloads weights or lists a slow disk; NCCL's own limit is 10 minutes.
        InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        # Training reads no running statistics, and evaluation sends its own: broadcasting them at each forward is for nothing.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    return Speaking(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=once,
        dynamo_backend="no",
        kwargs_handlers=handlers,
        **settings,
    )


def make_accelerator(run: Run, clip_grad: float | None, device: str, output: Path) -> Accelerator:
    """Accelerate on the device asked for.

    Args:
        run: for precision and trackers.
        clip_grad: the recipe's `optim.clip_grad`, with which the environment must agree.
        device: auto, cpu or cuda.
        output: where trackers write.

    Raises:
        UserError: a device, precision or tracker that is not there; one process where several were launched; a variable of the
            environment that contradicts the recipe.
    """
    cpu = on_cpu(device)
    precision = precision_of(run.precision, cpu)
    stated = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    launched = int(stated) if stated.isdigit() else 0
    alone = UserError(
        f"WORLD_SIZE={stated} is set, or so many tasks are, but one process is running: launch all of them (on CPUs: torchrun "
        f"--nproc_per_node {stated} train.py ...; on GPUs: accelerate launch train.py ...; with srun launch/slurm.sh), or unset WORLD_SIZE"
    )
    if launched != 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise alone
    must_agree(clip_grad, precision)  # on a CPU Accelerate would go on without a word, as DDP
    trackers = list(run.trackers)
    try:
        accelerator = plain_accelerator(cpu, precision, log_with=trackers or None, project_dir=output)
    except ValueError as error:
        raise UserError(f"run.precision={precision}, run.trackers={trackers}, or a variable ACCELERATE_*: {error}") from None
    if len(accelerator.log_with) < len(trackers):
        raise UserError(f"run.trackers={trackers}: not all of these are installed; pip install what is missing")
    if launched != accelerator.num_processes:
        raise alone
    if variables := environment():
        accelerator.print(f"environment {', '.join(f'{name}={value}' for name, value in variables.items())}: read, moves roundings")
    return accelerator
