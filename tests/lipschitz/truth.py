"""The truth that bounds are compared with: Jacobians in float64 at many inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sn_fast.lipschitz import LipschitzReport, lipschitz_bound


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def report_of(function: Callable[..., Any], x: Tensor, **keywords: Any) -> LipschitzReport:
    return lipschitz_bound(function if isinstance(function, nn.Module) else Apply(function), x, **keywords)


def bound_of(function: Callable[..., Any], x: Tensor) -> float:
    return report_of(function, x).bound


def jacobian_norm(function: Callable[..., Tensor], x: Tensor) -> float:
    """The 2-norm of the Jacobian at ``x``."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


def steepest(function: Callable[..., Tensor], shape: tuple[int, ...], samples: int = 20, scale: float = 1.0) -> float:
    """The largest norm of the Jacobian among random inputs."""
    inputs = scale * torch.randn(samples, *shape, dtype=torch.float64)
    return max(jacobian_norm(function, x) for x in inputs)


def random_statistics(model: nn.Module) -> nn.Module:
    """Batch normalisations as after training; float64, eval."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and m.running_var is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.2, 3)
            nn.init.normal_(m.weight)
    return model.double().eval()


def largest_slope(function: Callable[[Tensor], Any], shape: tuple[int, ...], samples: int = 3) -> float:
    """The largest slope seen: Jacobians, and differences of values at several distances (they see jumps)."""
    best = 0.0
    for scale in (0.3, 2.0):
        for _ in range(samples):
            x = scale * torch.randn(1, *shape, dtype=torch.float64)
            jacobian = torch.autograd.functional.jacobian(lambda v: flat(function(v * 1.0)), x)
            if jacobian.numel():
                best = max(best, float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)))
            best = max(best, difference(function, x, 1e-5), difference(function, x, 0.5))
    return best


@torch.no_grad()
def difference(function: Callable[[Tensor], Any], x: Tensor, distance: float) -> float:
    """|f(y) - f(x)| / |y - x| for a random y near ``x``."""
    step = distance * torch.randn_like(x)
    change = flat(function(x + step)) - flat(function(x.clone()))
    return float(change.norm() / step.norm()) * (1 - 1e-7)


def flat(values: Any) -> Tensor:
    """The values of a tensor, or of several, as one vector."""
    parts = values if isinstance(values, (tuple, list)) else [values]
    return torch.cat([p.reshape(-1).double() for p in parts])


@torch.no_grad()
def numerical_norm(function: Callable[[Tensor], Any], x: Tensor, step: float = 1e-6) -> float:
    """The 2-norm of the Jacobian from differences: also of what autograd does not see (out=, detach)."""
    at = flat(function(x.clone()))
    columns = [flat(function(x + step * e.reshape(x.shape))) - at for e in torch.eye(x.numel(), dtype=x.dtype)]
    return float(torch.linalg.matrix_norm(torch.stack(columns, 1) / step, 2))
