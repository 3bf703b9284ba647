"""Batch norms over all processes, on GPUs and CPUs.

torch's SyncBatchNorm takes no CPU. On a GPU it drops empty shares by a boolean mask: the host waits three times a layer, and each layer
breaks the graph of torch.compile. Shares are equal here, so that nothing need be dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norms(module: nn.Module) -> nn.Module:
    """Makes all batch norms of a module take their statistics over all processes; names of parameters and buffers stay."""
    for name, child in list(module.named_children()):
        setattr(module, name, synchronize_batch_norms(child))
    if not isinstance(module, _BatchNorm):
        return module
    synchronized = GlobalBatchNorm.__new__(GlobalBatchNorm)
    synchronized.__dict__ = module.__dict__
    return synchronized


class GlobalBatchNorm(_BatchNorm):
    """A batch norm over the shares of all processes, which are of one size; with what timm's batch norms do after it."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes [B,C] and [B,C,...]."""

    def forward(self, input: Tensor) -> Tensor:
        """[B,C,...] of this process -> the same, normalized by the statistics of all B x processes samples."""
        output = self._over_all(input) if self.training else super().forward(input)
        for name in ("drop", "act"):
            output = getattr(self, name, nn.Identity())(output)
        return output

    def _over_all(self, input: Tensor) -> Tensor:
        tracks, factor = self.track_running_stats and self.running_mean is not None, self.momentum
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if factor is None else factor
        running = (self.running_mean, self.running_var) if tracks else (None, None)
        output: Tensor = _Synchronized.apply(input, self.weight, self.bias, *running, self.eps, factor or 0.0)
        return output


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        factor: float,
    ) -> Tensor:
        processes, share = dist.get_world_size(), input.numel() // input.shape[1]
        if input.is_cuda:
            if not input.is_contiguous(memory_format=torch.channels_last):
                input = input.contiguous()
            mean, invstd = torch.batch_norm_stats(input, eps)
            means, invstds = _gather(torch.stack([mean, invstd]), processes).unbind(1)
            counts = mean.new_full((processes,), share)
            mean, invstd = torch.batch_norm_gather_stats_with_counts(
                input, means, invstds, running_mean, running_var, factor, eps, counts
            )
            output = torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)
        else:
            wide = _wide(input)
            variance, mean = torch.var_mean(wide, _others(input), correction=0)
            variances, means = _gather(torch.stack([variance, mean]), processes).unbind(1)
            mean = means.mean(0)
            variance = variances.mean(0) + (means - mean).square().mean(0)
            if running_mean is not None and running_var is not None:
                unbiased = variance * (share * processes / max(share * processes - 1, 1))
                running_mean.lerp_(mean.to(running_mean.dtype), factor)
                running_var.lerp_(unbiased.to(running_var.dtype), factor)
            invstd = (variance + eps).rsqrt()
            scale = invstd if weight is None else invstd * weight
            output = (wide - _shaped(mean, input)) * _shaped(scale, input)
            output = (output if bias is None else output + _shaped(bias, input)).to(input.dtype)
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.processes, ctx.share = processes, share
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd = ctx.saved_tensors
        if gradient.is_cuda:
            if not gradient.is_contiguous(memory_format=torch.channels_last):
                gradient = gradient.contiguous()
            sum_g, sum_gx, of_weight, of_bias = torch.batch_norm_backward_reduce(
                gradient, input, mean, invstd, weight, True, weight is not None, weight is not None
            )
            sum_g, sum_gx = _sum(torch.stack([sum_g, sum_gx])).unbind(0)
            counts = torch.full((ctx.processes,), ctx.share, dtype=torch.int32, device=gradient.device)
            of_input = torch.batch_norm_backward_elemt(gradient, input, mean, invstd, weight, sum_g, sum_gx, counts)
        else:
            wide, centered = _wide(gradient), _wide(input) - _shaped(mean, input)
            sum_g, sum_gx = wide.sum(_others(input)), (wide * centered).sum(_others(input))
            of_weight, of_bias = sum_gx * invstd, sum_g
            total = ctx.processes * ctx.share
            sum_g, sum_gx = _sum(torch.stack([sum_g, sum_gx])).unbind(0)
            slope = _shaped(sum_gx * invstd.square() / total, input)
            scale = invstd if weight is None else invstd * weight
            of_input = (wide - _shaped(sum_g / total, input) - centered * slope) * _shaped(scale, input)
            of_input = of_input.to(input.dtype)
        if weight is None:
            return of_input, None, None, None, None, None, None
        return of_input, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None, None


def _gather(mine: Tensor, processes: int) -> Tensor:
    """[2,C] of this process -> [P,2,C] of all."""
    if mine.is_cuda:
        gathered = mine.new_empty(processes, *mine.shape)
        dist.all_gather_into_tensor(gathered.view(-1, mine.shape[1]), mine)
        return gathered
    parts = [torch.empty_like(mine) for _ in range(processes)]  # gloo
    dist.all_gather(parts, mine)
    return torch.stack(parts)


def _sum(mine: Tensor) -> Tensor:
    dist.all_reduce(mine)
    return mine


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _others(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x.ndim) if axis != 1]


def _shaped(of_channels: Tensor, x: Tensor) -> Tensor:
    return of_channels.view(-1, *[1] * (x.ndim - 2))
