"""The operator of the start of power iteration: the leading singular vectors that Lanczos finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference.geometry import decode
from ..reference.lanczos import lanczos_start as _reference
from ..reference.linear_map import compute_dtype
from .library import define, stream_of
from .power_step import plans_of, take

_MAX_ITERATIONS = 32  # csrc/spectral/lanczos.h: kMaxLanczos
_PASSES = 3  # likewise: kLanczosPasses


def _lanczos_start_kernel(
    module: ModuleType, weights: Sequence[Tensor], starts: Sequence[Tensor], geometry: Sequence[int], n_iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    plans = plans_of(module, "lanczos_start", weights, geometry)
    if n_iterations < 1:
        raise ValueError(f"lanczos_start: n_iterations={n_iterations} must be >= 1")
    if plans is None or len(plans) > 1 or n_iterations > _MAX_ITERATIONS:
        return _reference(weights, starts, geometry, n_iterations)
    shapes_of_starts = [v if from_v else u for (u, v), from_v in zip(plans[0].shapes, plans[0].starts_from_v)]
    if not take("lanczos_start", "start", starts, shapes_of_starts, weights[0]):
        return _reference(weights, starts, geometry, n_iterations)
    (plan,), device = plans, weights[0].device
    n, count = n_iterations, plan.n_spans
    # The start side is the result of the second half step, the other side that of the first.
    sizes = plan.result_sizes[::-1]
    bases = [torch.empty(n, size, dtype=torch.float32, device=device) for size in sizes]
    torch.cat([x.reshape(-1) for x in starts], out=bases[0][0])
    results = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
    parts, n_parts = plan.parts
    norms = [
        torch.empty(size, dtype=torch.float64, device=device)
        for size in (max(plan.norm_sizes), n * count, n * count, _PASSES * max(n_parts) * (n + 1))
    ]
    partials = torch.empty(plan.partial_size, dtype=torch.float32, device=device)
    counters = torch.empty(plan.n_counters, dtype=torch.int32, device=device)
    maps, items, _, table = plan.tables.addresses()
    module.lanczos(
        (maps, items, table),
        plan.n_items,
        parts.addresses(),
        n_parts,
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
    for i, (shapes, from_v) in enumerate(zip(plan.shapes, plan.starts_from_v)):
        sides = (1, 0) if from_v else (0, 1)
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
    _reference,
    _lanczos_start_fake,
    _lanczos_start_kernel,
)
