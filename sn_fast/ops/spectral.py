"""The operators of grouped power iteration and of its start."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference.geometry import Geometry, decode
from ..reference.lanczos import lanczos_start as _lanczos_start_reference
from ..reference.linear_map import compute_dtype
from ..reference.power import power_step as _power_step_reference
from .library import define, stream_of
from .plan import Layout, Plan

PRECISIONS = ("fp32", "tf32", "3xtf32", "bf16")  # csrc/spectral/half_step.h: Precision
_MAX_OPERATORS = 200  # csrc/spectral/half_step.h: kMaxOperators
_MAX_LANCZOS = 32  # csrc/spectral/lanczos.cuh: kMaxLanczos


def _power_step_fake(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    sigmas = [w.new_empty((), dtype=compute_dtype(w, u)) for w, u in zip(weights, us)]
    groups = [w.new_empty((), dtype=torch.int64) for w in weights]
    u, v = ([torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for xs in (us, vs))
    return u, v, sigmas, groups


Vectors = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _power_step_kernel(
    module: ModuleType,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> Vectors:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    geometries = decode(geometry)
    if not len(weights) == len(us) == len(vs) == len(geometries):
        raise ValueError(
            f"power_step: {len(weights)} weights, {len(us)} us, {len(vs)} vs, {len(geometries)} geometries"
        )
    layouts = [_layout(w, u, v, g) for w, u, v, g in zip(weights, us, vs, geometries)]
    known = [layout for layout in layouts if layout is not None]
    if not weights or len(known) < len(layouts):
        return _power_step_reference(weights, us, vs, geometry, n_iterations, precision)
    us, vs = [u.contiguous() for u in us], [v.contiguous() for v in vs]
    pieces: list[Vectors] = []
    for i in range(0, len(known), _MAX_OPERATORS):
        part = slice(i, i + _MAX_OPERATORS)
        plan = _plan(module, tuple(known[part]), weights[0].device)
        advanced: Vectors = (us[part], vs[part], [], [])
        for _ in range(n_iterations):
            advanced = _power_step_once(module, plan, weights[part], advanced[0], advanced[1], precision)
        pieces.append(advanced)
    if len(pieces) == 1:
        return pieces[0]
    u, v, sigma, group = ([t for piece in column for t in piece] for column in zip(*pieces))
    return u, v, sigma, group


def _layout(weight: Tensor, u: Tensor, v: Tensor, geometry: Geometry) -> Layout | None:
    """What the kernels need to know; None where they do not take the tensors. Wrong shapes and devices raise."""
    for name, t, shape in (("u", u, geometry.out_shape(weight.shape)), ("v", v, geometry.in_shape(weight.shape))):
        if tuple(t.shape) != shape:
            raise ValueError(f"power_step: {name} has shape {tuple(t.shape)}, the operator needs {shape}")
        if t.device != weight.device:
            raise ValueError(f"power_step: {name} is on {t.device}, its weight on {weight.device}; move one of them")
    if u.dtype != torch.float32 or v.dtype != torch.float32 or max(u.numel(), v.numel()) >= 2**31:
        return None
    return Layout.of(weight, geometry)


@functools.lru_cache(maxsize=64)
def _plan(module: ModuleType, layouts: tuple[Layout, ...], device: torch.device) -> Plan:
    return Plan(module, layouts, device, module.parallel_blocks(stream_of(device)[1]))


def _power_step_once(
    module: ModuleType,
    plan: Plan,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    precision: str,
) -> Vectors:
    device = weights[0].device
    # Of each operator: the vector it starts from, and the one of the other side.
    starts = [v if first else u for u, v, first in zip(us, vs, plan.starts_from_v)]
    others = [u if first else v for u, v, first in zip(us, vs, plan.starts_from_v)]
    results = [torch.empty(n, dtype=torch.float32, device=device) for n in plan.result_sizes]
    sigmas = torch.empty(len(weights), dtype=torch.float32, device=device)
    groups = torch.empty(len(weights), dtype=torch.int64, device=device)
    norms = torch.empty(sum(plan.norm_sizes), dtype=torch.float64, device=device)
    partials = torch.empty(plan.partial_size, dtype=torch.float32, device=device)
    counters = torch.empty(plan.n_counters, dtype=torch.int32, device=device)
    module.power_step(
        plan.addresses,
        plan.n_units,
        plan.n_pieces,
        [w.data_ptr() for w in weights],
        [t.data_ptr() for t in starts],
        [t.data_ptr() for t in others],
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
    # Views of the results, one per operator: separate allocations and copies would cost more than the kernels.
    first = torch._utils._unflatten_dense_tensors(results[0], others)
    second = torch._utils._unflatten_dense_tensors(results[1], starts)
    u = [a if start else b for a, b, start in zip(first, second, plan.starts_from_v)]
    v = [b if start else a for a, b, start in zip(first, second, plan.starts_from_v)]
    return u, v, list(sigmas.unbind()), list(groups.unbind())


power_step = define(
    "power_step(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] geometry, int n_iterations, str precision='fp32')"
    " -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _power_step_reference,
    _power_step_fake,
    _power_step_kernel,
)


def _lanczos_start_kernel(
    module: ModuleType, weights: Sequence[Tensor], starts: Sequence[Tensor], geometry: Sequence[int], n_iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    geometries = decode(geometry)
    layouts = [Layout.of(w, g) for w, g in zip(weights, geometries, strict=True)]
    known = tuple(layout for layout in layouts if layout is not None)
    taken = len(known) == len(weights) <= _MAX_OPERATORS and 1 <= n_iterations <= _MAX_LANCZOS
    if not weights or not taken or any(x.dtype != torch.float32 for x in starts):
        return _lanczos_start_reference(weights, starts, geometry, n_iterations)
    device = weights[0].device
    plan = _plan(module, known, device)
    n, count = n_iterations, plan.n_spans
    # The start side is the result of the second half step, the other side that of the first.
    sizes = plan.result_sizes[::-1]
    bases = [torch.empty(n, size, dtype=torch.float32, device=device) for size in sizes]
    torch.cat([x.reshape(-1) for x in starts], out=bases[0][0])
    results = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
    norms = [
        torch.empty(size, dtype=torch.float64, device=device) for size in (max(plan.norm_sizes), n * count, n * count)
    ]
    partials = torch.empty(plan.partial_size, dtype=torch.float32, device=device)
    counters = torch.empty(plan.n_counters, dtype=torch.int32, device=device)
    gathers, units, _, table = plan.addresses
    module.lanczos(
        (gathers, units, plan.spans.data_ptr(), table),
        plan.n_units,
        count,
        n,
        [w.data_ptr() for w in weights],
        plan.offsets[::-1],
        sizes,
        [b.data_ptr() for b in bases],
        [r.data_ptr() for r in results],
        [t.data_ptr() for t in norms],
        partials.data_ptr(),
        counters.data_ptr(),
        plan.n_counters,
        stream_of(device),
    )
    us, vs = [], []
    for i, (weight, g) in enumerate(zip(weights, geometries)):
        shapes = g.out_shape(weight.shape), g.in_shape(weight.shape)
        sides = (1, 0) if g.axes else (0, 1)
        u, v = (
            results[side].narrow(0, plan.offsets[1 - side][i], math.prod(shape)).reshape(shape).clone()
            for side, shape in zip(sides, shapes)
        )
        us.append(u)
        vs.append(v)
    return us, vs


def _lanczos_start_fake(
    weights: Sequence[Tensor], starts: Sequence[Tensor], geometry: Sequence[int], n_iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    us, vs = [], []
    for w, x, g in zip(weights, starts, decode(geometry)):
        us.append(w.new_empty(g.out_shape(w.shape), dtype=compute_dtype(w, x)))
        vs.append(w.new_empty(g.in_shape(w.shape), dtype=compute_dtype(w, x)))
    return us, vs


lanczos_start = define(
    "lanczos_start(Tensor[] weights, Tensor[] starts, int[] geometry, int n_iterations) -> (Tensor[], Tensor[])",
    _lanczos_start_reference,
    _lanczos_start_fake,
    _lanczos_start_kernel,
)
