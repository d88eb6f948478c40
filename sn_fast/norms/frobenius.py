"""The Frobenius norm of a linear map: of a layer in closed form, of others by their products."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.applying import apply, apply_adjoint
from ..layers.operators import LinearOperator, unscaled
from ..layers.weighted import LayerOperator, in_precision, layer_operator
from ..reference.geometry import Axis
from .symbol import UNIT_ROUNDOFF

_CHUNK = 1 << 24  # elements of the images that are computed at once
_MOST_PRODUCTS = 1 << 14  # of an operator that is known by its products


class Frobenius(NamedTuple):
    """A Frobenius norm as computed, and a number that it provably does not exceed (None: not known)."""

    value: float
    upper: float | None


def frobenius_norm(op: LinearOperator) -> Frobenius:
    """||A||_F of the operator at its own input size, in float64.

    A layer's matrix holds weight w_t wherever tap t of an output reads an input, and a sum of weights where padding
    makes several taps of one output read the same one. So ||A||_F^2 = sum_{t, u} <W_t, W_u> prod_i M_i[t_i, u_i], where
    M_i[t, u] counts, along axis i, the outputs whose taps t and u read the same input. With zero padding M_i is
    diagonal: each squared weight counts as often as its tap reads an input and not the padding.

    Raises:
        ValueError: a weight has NaN or infinite elements, or an operator that is known by its products alone is too
            large to be multiplied by every unit vector.
    """
    factors, core = unscaled(op)
    layer = layer_operator(core)
    found = _by_products(core) if layer is None else _of_layer(layer)
    for c in factors:
        upper = None if found.upper is None else math.nextafter(found.upper * abs(c), math.inf)
        found = Frobenius(found.value * abs(c), upper)
    return found


def _of_layer(op: LayerOperator) -> Frobenius:
    weight = op.weight.detach()
    largest = float(weight.abs().max())
    if not math.isfinite(largest):
        raise ValueError("the operator's weight has NaN or infinite elements; its norm is not defined")
    if not largest:
        return Frobenius(0.0, 0.0)
    scale = 2.0 ** max(-1022, min(1022, math.frexp(largest)[1]))  # exact, and squares neither vanish nor overflow
    weight = weight.double() / scale
    square, absolute = (_square(w, op) for w in (weight, weight.abs()))
    taps = math.prod(weight.shape[2:])
    error = 4 * (weight.numel() + taps + 8) * UNIT_ROUNDOFF * absolute
    upper = math.nextafter(math.sqrt(square + error), math.inf) * (1 + 4 * UNIT_ROUNDOFF) * scale
    return Frobenius(math.sqrt(max(square, 0.0)) * scale, upper)


def _square(weight: Tensor, op: LayerOperator) -> float:
    """sum_{t, u} <W_t, W_u> prod_i M_i[t_i, u_i]."""
    coupled = weight
    for i, axis in enumerate(op.geometry.axes):
        dim = weight.ndim - len(op.geometry.axes) + i
        if op.geometry.mode == "zeros":
            counts = torch.tensor(_reads(axis), dtype=weight.dtype, device=weight.device)
            coupled = coupled * counts.reshape(-1, *(1,) * (weight.ndim - 1 - dim))
        else:
            counts = _shared_reads(axis, op.geometry.mode).to(weight)
            coupled = torch.tensordot(coupled, counts, dims=([dim], [0])).movedim(-1, dim)
    return float((weight * coupled).sum())


@functools.lru_cache(maxsize=1024)
def _reads(axis: Axis) -> tuple[int, ...]:
    """Per tap, the number of outputs for which it reads an input, with zero padding."""
    counts = []
    for t in range(axis.kernel):
        shift = t * axis.dilation - axis.before
        first = max(0, -(shift // axis.stride))  # the smallest o with o * stride + shift >= 0
        last = min(axis.out - 1, (axis.size - 1 - shift) // axis.stride)
        counts.append(max(0, last - first + 1))
    return tuple(counts)


@functools.lru_cache(maxsize=256)
def _shared_reads(axis: Axis, mode: str) -> Tensor:
    """M (kernel, kernel): the number of outputs whose taps t and u read the same input."""
    rows = torch.tensor([axis.window(o, mode) for o in range(axis.out)], device="cpu")  # (out, kernel)
    return torch.stack([(rows == rows[:, t : t + 1]).sum(dim=0) for t in range(axis.kernel)]).double()


def _by_products(op: LinearOperator) -> Frobenius:
    """From the images of the unit vectors of the smaller side."""
    m, n = math.prod(op.out_shape), math.prod(op.in_shape)
    count = min(m, n)
    if count > _MOST_PRODUCTS:
        raise ValueError(
            f"the Frobenius norm of {op} takes {count} products, as it is known by its products alone; "
            f"at most {_MOST_PRODUCTS} are computed"
        )
    op = in_precision(op, torch.float64)
    shape, product = (op.out_shape, apply_adjoint) if m < n else (op.in_shape, apply)
    total = 0.0
    with torch.no_grad():
        for part in torch.arange(count, device=op.device).split(max(1, _CHUNK // max(m, n))):
            units = torch.zeros(len(part), count, dtype=torch.float64, device=op.device)
            units[torch.arange(len(part), device=op.device), part] = 1
            total += float(product(op, units.reshape(-1, *shape)).double().square().sum())
    return Frobenius(math.sqrt(total), None)
