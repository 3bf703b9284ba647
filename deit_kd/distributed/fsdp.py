"""FSDP2: weights, gradients and moments of a student cut over processes. DDP is the default; checkpoints are the same of both."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from deit_kd.errors import UserError

_ASKED = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets for distributed_type: FSDP


def fsdp_requested() -> bool:
    """Whether the launcher asks for FSDP. The variable is removed, because Accelerate would silently use DDP on CPUs.

    Raises:
        UserError: it asks for the first version.
    """
    if os.environ.get(_ASKED, "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for FSDP version 1: set fsdp_version: 2, as launch/fsdp2.yaml does, or use DDP")
    os.environ.pop(_ASKED)
    return True


def shard(*modules: nn.Module) -> None:
    """Shards each transformer block, and everything outside of blocks as one piece; only the module's own forward gathers them."""
    for module in modules:
        for block in [block for each in module.modules() for block in getattr(each, "blocks", ())]:
            fully_shard(block)
        fully_shard(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has cut parameters of it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, on every process; all must call this."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `other`, of the same shape, is sharded."""
    if isinstance(other, DTensor) and value.shape == other.shape:
        return distribute_tensor(value, other.device_mesh, other.placements)
    return value
