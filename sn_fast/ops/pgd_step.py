"""The operators of a gradient step and of the projections. Arguments are as in the reference, checked by ``attacks``.

The kernels take float32, float16 and bfloat16 (the gradient's may differ); the reference does the rest. They walk
through x_adv in the order of its memory. What that order does not fit is copied first, which costs two passes each:
an x or grad whose samples are laid out otherwise than those of x_adv, an x_adv whose samples are not dense, and a
bound that varies along other dimensions than one run of them (per-channel values and full-size boxes are no copies).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from ..reference import pgd_step as _reference
from ..reference.samples import Bound
from .library import define, dtype_code, stream_of
from .update_arguments import RESIDENT_BYTES, check, like_first, norm_code, one_of, takes
from .update_layout import Layout

_LEAST_SHARED = 8192  # bytes, more than the kernels need beside a sample
_MAX_TIES = 2**32  # elements of equal |g| that the kernels can count


def pgd_step_by_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor | None,
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
    """``pgd_step`` of checked arguments; without a gradient ``project``."""
    code = norm_code(norm)
    layout = Layout(x_adv)
    if not takes(x, x_adv, grad) or (norm == "1-exact" and layout.numel >= _MAX_TIES):
        with torch.no_grad():
            if grad is None:
                return _reference.project(x_adv, x, norm, eps, eps_per_sample, lower, upper)
            amounts = (eps, alpha, eps_per_sample, alpha_per_sample)
            return _reference.pgd_step(x_adv, x, grad, norm, *amounts, lower, upper, targeted, active)
    if x_adv.numel() == 0:
        return layout.result
    ball = eps_per_sample is not None or eps < math.inf
    sums, partials = 0, None
    if norm in ("2", "1") and 12 * layout.numel + _LEAST_SHARED > RESIDENT_BYTES:  # smaller samples fit in any dtype
        read = [x_adv, *([x] if ball else []), *([] if grad is None else [grad])]
        sums = module.pgd_step_partials(layout.sizes, [dtype_code(t) for t in read], code, RESIDENT_BYTES)
    if sums:
        partials = x_adv.new_empty(sums, dtype=torch.float64)
    module.pgd_step(
        layout.sizes,
        layout.elements(layout.out),
        layout.elements(x_adv),
        layout.elements(x if ball else None),
        layout.elements(grad),
        code,
        layout.amount(eps, eps_per_sample),
        layout.amount(alpha, alpha_per_sample),
        layout.bound(lower),
        layout.bound(upper),
        layout.flags(active),
        targeted,
        ball,
        0 if partials is None else partials.data_ptr(),
        RESIDENT_BYTES,
        stream_of(x.device),
    )
    return layout.finish()


def project_by_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
) -> Tensor:
    """``project`` of checked arguments: a step without a gradient."""
    return pgd_step_by_kernel(
        module, x_adv, x, None, norm, eps, 0.0, eps_per_sample, None, lower, upper, targeted=False, active=None
    )


def _pgd_step_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    norm: str,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    targeted: bool,
    active: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    per_sample = {"eps_per_sample": eps_per_sample, "alpha_per_sample": alpha_per_sample, "active": active}
    check(x, {"x_adv": x_adv, "grad": grad}, per_sample, (lower, upper))
    if active is not None and active.dtype != torch.bool:
        raise TypeError(f"active must be a bool tensor, got {active.dtype}; convert it with active.bool()")
    amounts = (eps, alpha, eps_per_sample, alpha_per_sample)
    clip = (one_of(lower, low), one_of(upper, high))
    return pgd_step_by_kernel(module, x_adv, x, grad, norm, *amounts, *clip, targeted, active)


def _project_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    check(x, {"x_adv": x_adv}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    return project_by_kernel(module, x_adv, x, norm, eps, eps_per_sample, one_of(lower, low), one_of(upper, high))


pgd_step = define(
    "pgd_step(Tensor x_adv, Tensor x, Tensor grad, str norm, float eps, float alpha, Tensor? eps_per_sample,"
    " Tensor? alpha_per_sample, Tensor? lower, Tensor? upper, bool targeted, Tensor? active, float? low=None,"
    " float? high=None) -> Tensor",
    _reference.pgd_step,
    like_first,
    _pgd_step_kernel,
)


project = define(
    "project(Tensor x_adv, Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper,"
    " float? low=None, float? high=None) -> Tensor",
    _reference.project,
    like_first,
    _project_kernel,
)
