"""Operators of power iteration and normalisation, and the autograd function of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import normalize as _normalize_reference
from ..reference.geometry import decode
from ..reference.linear_map import compute_dtype
from ..reference.normalize import normalize_backward as _normalize_backward_reference
from ..reference.power import power_step as _power_step_reference
from .library import define


def _power_step_fake(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], geometry: Sequence[int], n_iterations: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    sigmas = [w.new_empty((), dtype=compute_dtype(w, u)) for w, u in zip(weights, us)]
    groups = [w.new_empty((), dtype=torch.int64) for w in weights]
    u, v = ([torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for xs in (us, vs))
    return u, v, sigmas, groups


power_step = define(
    "power_step(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] geometry, int n_iterations)"
    " -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _power_step_reference,
    _power_step_fake,
)

_normalize = define(
    "normalize(Tensor weight, Tensor sigma, float beta, bool cap) -> Tensor",
    _normalize_reference.normalize,
    lambda weight, sigma, beta, cap: torch.empty_like(weight),
)

_normalize_backward = define(
    "normalize_backward(Tensor grad, Tensor weight, Tensor sigma, Tensor u, Tensor v, Tensor? group, int[] geometry,"
    " float beta, bool cap) -> Tensor",
    _normalize_backward_reference,
    lambda grad, weight, sigma, u, v, group, geometry, beta, cap: torch.empty_like(grad),
)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        group: Tensor | None,
        geometry: list[int],
        beta: float,
        cap: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, sigma, u, v, group)
        ctx.geometry, ctx.beta, ctx.cap = geometry, beta, cap
        return _normalize(weight, sigma, beta, cap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].to_dense() if grads[0].is_sparse else grads[0]  # an Embedding can ask for sparse gradients
        weight, sigma, u, v, group = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward: the same value, from operations that autograd can follow
            value = _normalize_reference.rayleigh(weight, u, v, group, *decode(ctx.geometry))
            output = _normalize_reference.normalize(weight, value, ctx.beta, ctx.cap)
            (grad_weight,) = torch.autograd.grad(output, weight, grad, create_graph=True)
        else:
            grad_weight = _normalize_backward(grad, weight, sigma, u, v, group, ctx.geometry, ctx.beta, ctx.cap)
        return grad_weight, None, None, None, None, None, None, None


def normalize(
    weight: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    group: Tensor | None,
    geometry: list[int],
    beta: float,
    cap: bool,
) -> Tensor:
    """The normalised weight; its gradient holds u and v constant and flows through sigma = <u, A v>.

    See ``reference.normalize`` for the formulas and ``reference.power.power_step`` for the shapes.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # torch.func (grad, vmap, jvp, ...) wants operations that it can follow: sigma, with the derivative of <u, A v>.
        value = _normalize_reference.rayleigh(weight, u, v, group, *decode(geometry))
        return _normalize_reference.normalize(weight, value + (sigma - value).detach(), beta, cap)
    return _Normalize.apply(weight, sigma, u, v, group, geometry, beta, cap)
