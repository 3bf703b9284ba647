"""The processes of a run: what was launched, and whether it is what runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator

from deit_kd.errors import UserError
from deit_kd.recipe import Recipe


def make_accelerator(recipe: Recipe, device: str, output: Path) -> Accelerator:
    """Accelerate on the device asked for.

    Args:
        recipe: for precision and trackers.
        device: auto, cpu or cuda.
        output: where trackers write.

    Raises:
        UserError: a device, precision or tracker that is not there; one process where several were launched.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a driver and a CUDA build of torch"
        )
    cpu = device == "cpu" or not torch.cuda.is_available()
    precision = recipe.run.precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if precision == "fp16" and cpu:
        raise UserError("run.precision=fp16: a CPU has no fp16 training; use bf16, no or auto")
    stated = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    launched = int(stated) if stated.isdigit() else 0
    alone = UserError(
        f"WORLD_SIZE={stated} is set, or so many tasks are, but one process is running: launch all of them (on CPUs: torchrun "
        f"--nproc_per_node {stated} train.py ...; on GPUs: accelerate launch train.py ...; with srun launch/slurm.sh), or unset WORLD_SIZE"
    )
    if launched != 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise alone
    for name in ("DEEPSPEED", "MEGATRON_LM"):  # on a CPU Accelerate would go on without a word, as DDP
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {name}, which checkpoints do not know: use launch/ddp8.yaml, or launch/fsdp2.yaml"
            )
    trackers = list(recipe.run.trackers)
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=precision, log_with=trackers or None, project_dir=output)
    except ValueError as error:
        raise UserError(f"run.precision={precision}, run.trackers={trackers}: {error}") from None
    if len(accelerator.log_with) < len(trackers):
        raise UserError(f"run.trackers={trackers}: not all of these are installed; pip install what is missing")
    if launched != accelerator.num_processes:
        raise alone
    return accelerator
