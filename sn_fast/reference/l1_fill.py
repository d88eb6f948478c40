"""Steps in the true l1 norm: the ball's threshold, and elements of largest gradient filled up to their bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .samples import Bound, numbers, one_if_zero, spread, total


def fill_steepest(
    z: Tensor,
    x: Tensor,
    g: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lower: Bound,
    upper: Bound,
    out: Tensor,
) -> None:
    """out := z after an l1 step of length alpha up the gradient within the clip, brought into the l1 ball around x.

    The elements of largest |g| go to their bound, one after the other, until alpha is spent: of all steps of that
    length within the clip none gains more on a linear loss. The ball then takes from the other elements alone (the
    nearest point, Duchi et al. 2008); where the full ones exceed eps by themselves, they are filled from x until eps is
    spent, and the others are back at x. So the iterates of a linear loss stop at its maximum over ball and clip. Where
    no bound is in reach nothing is full, and the step is that without a clip.
    """
    low, high = numbers(lower, -math.inf, z), numbers(upper, math.inf, z)
    known = ~(z.isnan() | x.isnan())
    size, sign = torch.where(known, g.abs(), 0.0), g.sign()
    bound = torch.where(g > 0, high, low)
    full, moved = _filled(size, sign, z, bound, alpha)
    if isinstance(eps, Tensor) or eps < math.inf:
        held = torch.where(full, (bound - x).abs(), 0.0)
        exceeds = total(held) > eps
        # 1) The full elements fit into the ball: the others share what they leave of it.
        delta = torch.where(full, 0.0, moved - x)
        threshold = l1_threshold(delta, (eps - total(held)).clamp(min=0))
        shrunk = (delta - delta.clamp(-threshold, threshold)).add_(x)
        inside = torch.where((threshold > 0) & ~full, shrunk, moved)
        # 2) They do not.
        _, refilled = _filled(torch.where(full, size, 0.0), sign, x, bound, eps)
        moved = torch.where(exceeds, refilled, inside)
    out.copy_(moved)


def _filled(size: Tensor, sign: Tensor, start: Tensor, bound: Tensor, budget: float | Tensor) -> tuple[Tensor, Tensor]:
    """Which elements reach ``bound``, and start with the elements of largest ``size`` moved, until budget is spent.

    Elements of equal size share what is left for them in proportion to their room.
    """
    room = torch.where(size > 0, (bound - start) * sign, 0.0).nan_to_num_(nan=0.0, posinf=math.inf).clamp_(min=0)
    room = torch.minimum(room, budget) if isinstance(budget, Tensor) else room.clamp_(max=budget)
    # 1) From the steepest downwards, the first element at which the budget is spent; its size ends the filling.
    sizes, order = size.flatten(1).sort(dim=1, descending=True)
    spent = room.flatten(1).gather(1, order).cumsum(dim=1)
    limit = budget.flatten(1) if isinstance(budget, Tensor) else budget
    last = (spent < limit).sum(dim=1, keepdim=True)
    cut = torch.where(last < sizes.shape[1], sizes.gather(1, last.clamp(max=sizes.shape[1] - 1)), 0.0)
    cut = spread(cut, size)
    # 2) What is above it is full; what is equal takes its part.
    full = size > cut
    sharing = (size == cut) & (room > 0)
    left = budget - total(torch.where(full, room, 0.0))
    part = (left / one_if_zero(total(torch.where(sharing, room, 0.0)))).clamp(0, 1)
    step = torch.where(sharing, sign * part * room, 0.0)
    return full, torch.where(full, bound, torch.where(step != 0, start + step, start))


def l1_threshold(delta: Tensor, eps: float | Tensor) -> Tensor:
    """By how much |delta| must shrink, stopping at 0, to have l1 norm eps; (B, 1, ..., 1), negative inside the ball.

    Duchi, Shalev-Shwartz, Singer, Chandra 2008, Fig. 1. With |delta| sorted downwards and S_j the sum of its first j
    elements the threshold is the largest of (S_j - eps) / j: these rise up to the published rho, and fall after it.
    """
    sums = delta.abs().flatten(1).sort(dim=1, descending=True).values.cumsum(dim=1)
    counts = torch.arange(1, sums.shape[1] + 1, dtype=sums.dtype, device=sums.device)
    radius = eps.flatten(1) if isinstance(eps, Tensor) else eps
    return spread(((sums - radius) / counts).amax(dim=1), delta)
