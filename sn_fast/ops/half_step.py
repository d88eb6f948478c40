"""One application of every operator, or of its adjoint, in one launch: what iterating on sharded weights needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference.geometry import decode
from ..reference.linear_map import compute_dtype, matvec, rmatvec
from .library import define, stream_of
from .power_step import plans_of, take
from .precision import PRECISIONS, resolved


def half_step(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], geometry: Sequence[int], second: bool, precision: str = "fp32"
) -> list[Tensor]:
    """The products of the first or the ``second`` half step of ``power_step``, not normalised.

    The first is A v of a convolution and A^T u of a matrix; the second A^T u of a convolution and A v of a matrix. A
    shard of a weight's rows has the rows of u that belong to it, and its A^T u is a part of the sum over all shards.

    Args:
        weights, geometry: as in ``power_step``.
        vectors: of each operator v or u, whichever is multiplied.

    Returns:
        Of each operator the other vector, float32 at least.
    """
    if not weights:
        return []
    flat = _half_step(weights, vectors, geometry, second, precision)
    shapes = _result_shapes(weights, geometry, second)
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def _result_shapes(weights: Sequence[Tensor], geometry: Sequence[int], second: bool) -> list[tuple[int, ...]]:
    known = decode(geometry)
    return [
        g.out_shape(w.shape) if bool(g.axes) != second else g.in_shape(w.shape)
        for w, g in zip(weights, known, strict=True)
    ]


def _half_step_reference(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], geometry: Sequence[int], second: bool, precision: str = "fp32"
) -> Tensor:
    results = []
    for weight, x, g in zip(weights, vectors, decode(geometry), strict=True):
        dtype = compute_dtype(weight, x)
        forward = bool(g.axes) != second
        results.append((matvec if forward else rmatvec)(x[None].to(dtype), weight.to(dtype), g).reshape(-1))
    return torch.cat(results)


def _half_step_fake(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], geometry: Sequence[int], second: bool, precision: str = "fp32"
) -> Tensor:
    sizes = [math.prod(shape) for shape in _result_shapes(weights, geometry, second)]
    dtypes = {compute_dtype(w, x) for w, x in zip(weights, vectors)}
    return weights[0].new_empty(sum(sizes), dtype=torch.float64 if torch.float64 in dtypes else torch.float32)


def _half_step_kernel(
    module: ModuleType,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    geometry: Sequence[int],
    second: bool,
    precision: str = "fp32",
) -> Tensor:
    plans = plans_of(module, "half_step", weights, geometry)
    half = int(second)
    if plans is None or len(plans) > 1:
        return _half_step_reference(weights, vectors, geometry, second, precision)
    (plan,) = plans
    wanted = [v if bool(g.axes) != second else u for (u, v), g in zip(plan.shapes, decode(geometry), strict=True)]
    if not take("half_step", "x", vectors, wanted, weights[0]):
        return _half_step_reference(weights, vectors, geometry, second, precision)
    vectors = [x.contiguous() for x in vectors]
    result = torch.empty(plan.result_sizes[half], dtype=torch.float32, device=plan.device)
    norms = torch.empty(plan.norm_sizes[half], dtype=torch.float64, device=plan.device)
    partials = torch.empty(plan.partial_size, dtype=torch.float32, device=plan.device)
    counters = torch.empty(plan.n_counters, dtype=torch.int32, device=plan.device)
    module.half_step(
        plan.tables.addresses(),
        plan.n_items,
        half,
        [w.data_ptr() for w in weights],
        [x.data_ptr() for x in vectors],
        result.data_ptr(),
        norms.data_ptr(),
        partials.data_ptr(),
        counters.data_ptr(),
        plan.n_counters,
        PRECISIONS.index(resolved(precision)),
        stream_of(plan.device),
    )
    return result


_half_step = define(
    "half_step(Tensor[] weights, Tensor[] vectors, int[] geometry, bool second, str precision='fp32') -> Tensor",
    _half_step_reference,
    _half_step_fake,
    _half_step_kernel,
)
