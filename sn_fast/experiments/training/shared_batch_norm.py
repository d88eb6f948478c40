"""Batch normalisation by the statistics of a batch of which each process has a part, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_AXES = (0, 2, 3)


def share_statistics(model: nn.Module) -> None:
    """From now on the layers ``BatchNorm2d`` of ``model``, the same in all processes, see the whole batch in training.

    PyTorch's SyncBatchNorm does the same on GPUs alone.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SharedBatchNorm2d


class _SharedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        exact = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)  # 0 where the batch left nothing
        dist.all_reduce(count)
        mean = _Sum.apply(exact.sum(_AXES)) / count
        centred = exact - _per_channel(mean)
        variance = _Sum.apply(centred.square().sum(_AXES)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * _per_channel(scale) + _per_channel(self.bias)).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)


class _Sum(torch.autograd.Function):
    """The sum over the processes; each one's loss depends on every part, so that gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
