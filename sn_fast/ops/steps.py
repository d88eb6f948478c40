"""The operators of the attacks' updates as the attacks call them: checked arguments, the shortest way to the kernel.

An update of a small batch takes less time on the device than a call through the dispatcher takes on the host. So where
nothing has to see the call (``is_watched``), it goes to the kernel or the reference straight; the results are the same.
Arguments are as in the operators, but a bound may be a number; autograd takes no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import pgd_step as _pgd_reference
from ..reference import wrm_step as _wrm_reference
from ..reference.samples import Bound
from . import pgd_step as _pgd
from . import random_start as _start
from . import wrm_step as _wrm
from .library import is_watched, kernels_of


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    norm: str,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
    targeted: bool,
    active: Tensor | None,
) -> Tensor:
    """See ``attacks.pgd_step``."""
    arguments = (x_adv, x, grad, norm, eps, alpha, eps_per_sample, alpha_per_sample)
    watched = is_watched(x_adv, x, grad)
    module = None if watched else kernels_of(x.device)
    if module is not None:
        return _pgd.pgd_step_by_kernel(module, *arguments, lower, upper, targeted, active)
    with torch.no_grad():
        if not watched:
            return _pgd_reference.pgd_step(*arguments, lower, upper, targeted, active)
        (lower, low), (upper, high) = _split(lower), _split(upper)
        return _pgd.pgd_step(*arguments, lower, upper, targeted, active, low, high)


def wrm_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Bound,
    upper: Bound,
) -> Tensor:
    """See ``attacks.wrm_step``."""
    arguments = (x_adv, x, grad, eps, eps_per_sample, step)
    watched = is_watched(x_adv, x, grad)
    module = None if watched else kernels_of(x.device)
    if module is not None:
        return _wrm.wrm_step_by_kernel(module, *arguments, lower, upper)
    with torch.no_grad():
        if not watched:
            return _wrm_reference.wrm_step(*arguments, lower, upper)
        (lower, low), (upper, high) = _split(lower), _split(upper)
        return _wrm.wrm_step(*arguments, lower, upper, low, high)


def project(
    x_adv: Tensor, x: Tensor, norm: str, eps: float, eps_per_sample: Tensor | None, lower: Bound, upper: Bound
) -> Tensor:
    """See ``attacks.project``."""
    arguments = (x_adv, x, norm, eps, eps_per_sample)
    watched = is_watched(x_adv, x)
    module = None if watched else kernels_of(x.device)
    if module is not None:
        return _pgd.project_by_kernel(module, *arguments, lower, upper)
    with torch.no_grad():
        if not watched:
            return _pgd_reference.project(*arguments, lower, upper)
        (lower, low), (upper, high) = _split(lower), _split(upper)
        return _pgd.project(*arguments, lower, upper, low, high)


def random_start(
    x: Tensor, norm: str, eps: float, eps_per_sample: Tensor | None, lower: Bound, upper: Bound, seed: Tensor
) -> Tensor:
    """See ``reference.random_start``; ``seed`` on x's device."""
    module = None if is_watched(x, seed) else kernels_of(x.device)
    if module is not None:
        return _start.random_start_by_kernel(module, x, norm, eps, eps_per_sample, lower, upper, seed)
    (lower, low), (upper, high) = _split(lower), _split(upper)
    return _start.random_start(x, norm, eps, eps_per_sample, lower, upper, seed, low, high)


def _split(bound: Bound) -> tuple[Tensor | None, float | None]:
    return (bound, None) if isinstance(bound, Tensor) else (None, bound)
