"""The updates of an attack as attack libraries do them: one tensor operation after the other.

The order of operations is that of torchattacks' PGD and PGDL2 between two gradients; its wrm and l1 do not exist, so
these are the formulas written down.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linf(x_adv: Tensor, x: Tensor, grad: Tensor, eps: float, alpha: float) -> Tensor:
    """sign, mul, add, sub, clamp, add, clamp: 7 kernels, 17 passes over a full-size tensor."""
    x_adv = x_adv + alpha * grad.sign()
    delta = torch.clamp(x_adv - x, min=-eps, max=eps)
    return torch.clamp(x + delta, min=0, max=1)


def l2(x_adv: Tensor, x: Tensor, grad: Tensor, eps: float, alpha: float) -> Tensor:
    """14 kernels, 19 passes."""
    return _radial(x_adv, x, grad, eps, alpha, 2)


def l1(x_adv: Tensor, x: Tensor, grad: Tensor, eps: float, alpha: float) -> Tensor:
    """As ``l2``, in the other norm."""
    return _radial(x_adv, x, grad, eps, alpha, 1)


def wrm(x_adv: Tensor, x: Tensor, grad: Tensor, eps: float, step: float) -> Tensor:
    """5 kernels, 14 passes."""
    return x_adv + step * (eps * grad - (x_adv - x))


def random_start(x: Tensor, eps: float) -> Tensor:
    """empty, uniform, add, clamp."""
    return torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), min=0, max=1)


def _radial(x_adv: Tensor, x: Tensor, grad: Tensor, eps: float, alpha: float, order: int) -> Tensor:
    n = len(x)
    ones = (n,) + (1,) * (x.dim() - 1)
    norms = torch.linalg.vector_norm(grad.reshape(n, -1), order, dim=1) + 1e-10
    x_adv = x_adv + alpha * (grad / norms.view(ones))
    delta = x_adv - x
    factor = eps / torch.linalg.vector_norm(delta.reshape(n, -1), order, dim=1)
    delta = delta * torch.min(factor, torch.ones_like(factor)).view(ones)
    return torch.clamp(x + delta, min=0, max=1)
