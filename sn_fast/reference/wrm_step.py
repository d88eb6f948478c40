"""The inner step of WRM; see ``samples`` for what the updates have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_map import compute_dtype
from .samples import BUFFERS, Bound, amount_of, axpy, cast, clip_, finite, in_parts


def wrm_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Bound,
    upper: Bound,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """x_adv + step (eps g - (x_adv - x)), then clip; a negative eps descends.

    A non-finite gradient element counts as 0.
    """
    dtype = compute_dtype(x_adv, grad)
    result = torch.empty_like(x_adv)
    for (out, start, centre, g, radii), clip in in_parts(
        result, (x_adv, x, grad, eps_per_sample), lower, upper, low, high
    ):
        start, centre = cast(start, dtype), cast(centre, dtype)
        moved = out if out.dtype == dtype else BUFFERS.get(2, out, dtype)
        axpy(amount_of(eps, radii, start), finite(g, out=moved), centre, out=moved)
        torch.lerp(start, moved, step, out=moved)
        clip_(moved, *clip)
        if moved is not out:
            out.copy_(moved)
    return result
