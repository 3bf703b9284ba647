"""A task's module on its device and spread over processes, with its optimizer and its average."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from deit_kd.distributed import fsdp
from deit_kd.training.task import Task


def prepare(
    task: Task, make_optimizer: Callable[[nn.Module], Optimizer], ema_decay: float | None, accelerator: Accelerator, sharded: bool
) -> tuple[Optimizer, ModelEmaV3 | None]:
    """Puts the task's module on its device and spreads it over processes, by DDP or by FSDP2; gives optimizer and EMA of it."""
    task.module.to(accelerator.device)
    ema = ModelEmaV3(task.student, decay=ema_decay) if ema_decay else None
    if sharded and accelerator.num_processes > 1:
        task.module = accelerator.prepare_model(task.module, evaluation_mode=True)  # autocast, without DDP
        fsdp.shard(task.module, *([ema.module] if ema else []))
        return accelerator.prepare(make_optimizer(task.module)), ema
    task.module, optimizer = accelerator.prepare(task.module, make_optimizer(task.module))
    return optimizer, ema
