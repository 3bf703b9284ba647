"""Batch norms of a frozen network, folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from deit_kd.models.features import TimmModel

_Norm = nn.modules.batchnorm._BatchNorm  # timm's, which end with an activation, among them


@torch.no_grad()
def fold_batch_norms(model: TimmModel, forward: Callable[[], object]) -> int:
    """Folds each batch norm that reads nothing but one convolution's output; the sums are taken in float64.

    What a norm reads is seen in a forward, so that any architecture can be folded whatever it calls its layers.

    Args:
        model: in evaluation mode; changed in place.
        forward: runs it once, on whatever it takes.

    Returns:
        How many were folded.
    """
    pairs = _pairs(model, forward)
    places = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for conv, norm in pairs:
        scale = norm.weight.double() if norm.affine else torch.ones_like(norm.running_var, dtype=torch.float64)
        scale = scale * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = (norm.bias.double() if norm.affine else 0.0) - norm.running_mean.double() * scale
        bias = shift if conv.bias is None else shift + conv.bias.double() * scale
        weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.ndim - 1))
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        parent, name = places[norm]
        setattr(parent, name, _rest(norm))
    return len(pairs)


def _pairs(model: TimmModel, forward: Callable[[], object]) -> list[tuple[Any, Any]]:
    """(convolution, norm) where both run once a forward, and the norm reads what the convolution gave."""
    convs = [
        each for each in model.modules() if type(each) in (nn.Conv1d, nn.Conv2d, Conv2dSame)
    ]  # others change their weights first
    norms = [each for each in model.modules() if isinstance(each, _Norm) and each.track_running_stats and not each.training]
    made: list[tuple[nn.Module, Tensor]] = []
    read: list[tuple[nn.Module, Tensor]] = []
    calls: dict[nn.Module, int] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        (made if module in convs else read).append((module, output if module in convs else inputs[0]))

    hooks = [module.register_forward_hook(keep) for module in (*convs, *norms)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    maker = {id(output): conv for conv, output in made}  # `made` keeps them, so that no other tensor takes their place
    found = [(maker[id(given)], norm) for norm, given in read if id(given) in maker]
    readers = [conv for conv, _ in found]
    return [(conv, norm) for conv, norm in found if calls[conv] == calls[norm] == readers.count(conv) == 1]


def _rest(norm: nn.Module) -> nn.Module:
    """What timm's norms do beside normalizing."""
    parts = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)
