"""The operator of grouped power iteration."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference.geometry import decode
from ..reference.linear_map import compute_dtype
from ..reference.power import power_step as _power_step_reference
from .layout import Layout
from .library import define, stream_of
from .plan import Plan
from .precision import PRECISIONS, resolved

MAX_OPERATORS = 200  # csrc/spectral/half_step.h: kMaxOperators


Vectors = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
# What the operator returns: the results of the first and of the second half step, sigmas and groups, each of all
# operators in one tensor. A list of tensors would take as long to allocate as to compute.
Flat = tuple[Tensor, Tensor, Tensor, Tensor]


def power_step(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> Vectors:
    """``reference.power.power_step`` by kernels where there are some; products as ``precision`` says.

    The vectors returned are views of two tensors.
    """
    if not weights:
        return [], [], [], []
    images, starts, sigmas, groups = _power_step(weights, us, vs, geometry, n_iterations, precision)
    first, second = _unflatten(images, images_of(us, vs)), _unflatten(starts, starts_of(us, vs))
    u, v = images_of(first, second, by=us), starts_of(first, second, by=us)
    sigma = [x.to(compute_dtype(w, like)) for x, w, like in zip(sigmas.unbind(), weights, us)]
    return u, v, sigma, list(groups.unbind())


def starts_of(us: Sequence[Tensor], vs: Sequence[Tensor], by: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Of each operator the vector from which its iteration starts: v of a convolution, u of a matrix."""
    return [v if like.dim() > 1 else u for u, v, like in zip(us, vs, us if by is None else by, strict=True)]


def images_of(us: Sequence[Tensor], vs: Sequence[Tensor], by: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Of each operator the vector on the other side: u of a convolution, v of a matrix."""
    return [u if like.dim() > 1 else v for u, v, like in zip(us, vs, us if by is None else by, strict=True)]


def _unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    if torch.compiler.is_compiling():
        parts = [x.view(t.shape) for x, t in zip(flat.split([t.numel() for t in like]), like)]
    else:
        parts = torch._utils._unflatten_dense_tensors(flat, like)  # the same in one call
    return [x.to(t.dtype) for x, t in zip(parts, like)]


def _power_step_flat(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> Flat:
    u, v, sigma, group = _power_step_reference(weights, us, vs, geometry, n_iterations, precision)
    images, starts = (torch.cat([x.reshape(-1) for x in xs]) for xs in (images_of(u, v), starts_of(u, v)))
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in sigma))
    return images, starts, torch.stack([x.to(dtype) for x in sigma]), torch.stack(group)


def _power_step_fake(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> Flat:
    dtype, sigma = (
        functools.reduce(torch.promote_types, dtypes)
        for dtypes in ([t.dtype for t in us], [compute_dtype(w, u) for w, u in zip(weights, us)])
    )
    images, starts = (
        xs[0].new_empty(sum(x.numel() for x in xs), dtype=dtype) for xs in (images_of(us, vs), starts_of(us, vs))
    )
    n, like = len(weights), weights[0]
    return images, starts, like.new_empty(n, dtype=sigma), like.new_empty(n, dtype=torch.int64)


def _power_step_kernel(
    module: ModuleType,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> Flat:
    precision = resolved(precision)
    if n_iterations < 1:
        raise ValueError(f"power_step: n_iterations={n_iterations} must be >= 1")
    plans = plans_of(module, "power_step", weights, geometry)
    u_shapes, v_shapes = ([shapes[side] for plan in plans or () for shapes in plan.shapes] for side in (0, 1))
    if (
        plans is None
        or not take("power_step", "u", us, u_shapes, weights[0])
        or not take("power_step", "v", vs, v_shapes, weights[0])
    ):
        return _power_step_flat(weights, us, vs, geometry, n_iterations, precision)
    pieces: list[Flat] = []
    for i, plan in zip(range(0, len(weights), MAX_OPERATORS), plans):
        part = slice(i, i + MAX_OPERATORS)
        starts = [x.contiguous() for x in starts_of(us[part], vs[part])]
        images = [x.contiguous() for x in images_of(us[part], vs[part])]
        for _ in range(n_iterations):
            flat = _power_step_once(module, plan, weights[part], starts, images, precision)
            images, starts = _unflatten(flat[0], images), _unflatten(flat[1], starts)
        pieces.append(flat)
    if len(pieces) == 1:
        return pieces[0]
    first, second, sigmas, groups = (torch.cat(column) for column in zip(*pieces))
    return first, second, sigmas, groups


Weight = tuple[torch.Size, tuple[int, ...], torch.dtype]


def plans_of(
    module: ModuleType, operator: str, weights: Sequence[Tensor], geometry: Sequence[int]
) -> list[Plan] | None:
    """A plan for every 200 operators; None where the kernels do not take them. What does not fit together raises."""
    if not weights:
        return None
    device = weights[0].device
    for w in weights:
        if w.device != device:
            raise ValueError(f"{operator}: weights are on {device} and on {w.device}; one call is for one device")
    try:
        return _plans(module, tuple(geometry), tuple((w.shape, w.stride(), w.dtype) for w in weights), device)
    except _Mismatch as error:
        raise ValueError(f"{operator}: {error}") from None


class _Mismatch(ValueError):
    """Weights that do not belong to their geometries."""


@functools.lru_cache(maxsize=512)
def _plans(
    module: ModuleType, geometry: tuple[int, ...], weights: tuple[Weight, ...], device: torch.device
) -> list[Plan] | None:
    geometries = decode(geometry)
    if len(weights) != len(geometries):
        raise _Mismatch(f"{len(weights)} weights for {len(geometries)} geometries; give one of each")
    layouts = []
    for (shape, stride, dtype), g in zip(weights, geometries):
        if tuple(shape[2:]) != tuple(a.kernel for a in g.axes):
            raise _Mismatch(f"a weight of shape {tuple(shape)} does not fit its geometry {g}")
        layout = Layout.of(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), g)
        if layout is None or max(math.prod(g.in_shape(shape)), math.prod(g.out_shape(shape))) >= 2**31:
            return None
        layouts.append(layout)
    parallel = module.parallel_blocks(stream_of(device)[1])
    plans = [
        Plan(module, layouts[i : i + MAX_OPERATORS], device, parallel) for i in range(0, len(layouts), MAX_OPERATORS)
    ]
    return plans if all(max(plan.result_sizes) < 2**31 for plan in plans) else None


def take(operator: str, name: str, vectors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], like: Tensor) -> bool:
    """Whether the kernels take these vectors of ``like``'s device. Wrong numbers, shapes and devices raise."""
    if len(vectors) != len(shapes):
        raise ValueError(f"{operator}: {len(vectors)} vectors {name} for {len(shapes)} weights; give one of each")
    for x, shape in zip(vectors, shapes):
        if tuple(x.shape) != shape:
            raise ValueError(f"{operator}: {name} has shape {tuple(x.shape)}, the operator needs {shape}")
        if x.device != like.device:
            raise ValueError(f"{operator}: {name} is on {x.device}, its weight on {like.device}; move one of them")
    return all(x.dtype == torch.float32 for x in vectors)


def _power_step_once(
    module: ModuleType,
    plan: Plan,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    images: Sequence[Tensor],
    precision: str,
) -> Flat:
    device = plan.device
    results = [torch.empty(n, dtype=torch.float32, device=device) for n in plan.result_sizes]
    sigmas = torch.empty(len(weights), dtype=torch.float32, device=device)
    groups = torch.empty(len(weights), dtype=torch.int64, device=device)
    norms = torch.empty(sum(plan.norm_sizes), dtype=torch.float64, device=device)
    partials = torch.empty(plan.partial_size, dtype=torch.float32, device=device)
    counters = torch.empty(plan.n_counters, dtype=torch.int32, device=device)
    module.power_step(
        plan.tables.addresses(),
        plan.n_items,
        plan.n_slices,
        [w.data_ptr() for w in weights],
        [t.data_ptr() for t in starts],
        [t.data_ptr() for t in images],
        [r.data_ptr() for r in results],
        sigmas.data_ptr(),
        groups.data_ptr(),
        [norms.data_ptr(), norms.data_ptr() + 8 * plan.norm_sizes[0]],
        partials.data_ptr(),
        counters.data_ptr(),
        plan.n_counters,
        PRECISIONS.index(precision),
        stream_of(device),
    )
    return results[0], results[1], sigmas, groups


_power_step = define(
    "power_step(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] geometry, int n_iterations, str precision='fp32')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _power_step_flat,
    _power_step_fake,
    _power_step_kernel,
)
