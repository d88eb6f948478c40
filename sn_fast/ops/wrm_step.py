"""The operator of the inner step of WRM. Arguments are as in the reference, checked by ``attacks``."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..reference.samples import Bound
from ..reference.wrm_step import wrm_step as _reference
from .library import define, stream_of
from .update_arguments import check, like_first, one_of, takes
from .update_layout import Layout


def wrm_step_by_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Bound,
    upper: Bound,
) -> Tensor:
    """``wrm_step`` of checked arguments."""
    if not takes(x, x_adv, grad):
        with torch.no_grad():
            return _reference(x_adv, x, grad, eps, eps_per_sample, step, lower, upper)
    layout = Layout(x_adv)
    if x_adv.numel() == 0:
        return layout.result
    module.wrm_step(
        layout.sizes,
        layout.elements(layout.out),
        layout.elements(x_adv),
        layout.elements(x),
        layout.elements(grad),
        layout.amount(eps, eps_per_sample),
        step,
        layout.bound(lower),
        layout.bound(upper),
        stream_of(x.device),
    )
    return layout.finish()


def _wrm_step_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Tensor | None,
    upper: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    check(x, {"x_adv": x_adv, "grad": grad}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    clip = (one_of(lower, low), one_of(upper, high))
    return wrm_step_by_kernel(module, x_adv, x, grad, eps, eps_per_sample, step, *clip)


wrm_step = define(
    "wrm_step(Tensor x_adv, Tensor x, Tensor grad, float eps, Tensor? eps_per_sample, float step, Tensor? lower,"
    " Tensor? upper, float? low=None, float? high=None) -> Tensor",
    _reference,
    like_first,
    _wrm_step_kernel,
)
