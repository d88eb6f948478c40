"""Singular vectors of weights that come with no state of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.geometry import Geometry, decode
from ..reference.linear_map import compute_dtype
from .lanczos import lanczos_start
from .library import LIBRARY, define
from .power_step import power_step, starts_of

LANCZOS_STEPS = 15
ROUNDS = 2  # of Lanczos, for a weight from outside: after one, a gap of 1 % leaves vectors far off, and the gradient
POWER_STEPS = 2  # the first repeats what Lanczos found, the second is one beyond it


def random_starts(weights: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
    """Of each operator the vector from which Lanczos starts; equal calls give equal vectors, on every device."""
    starts = []
    for weight, geometry in zip(weights, geometries):
        shape = geometry.in_shape(weight.shape) if geometry.axes else geometry.out_shape(weight.shape)
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        starts.append(start.to(weight.device, compute_dtype(weight)))
    return starts


def _singular_vectors(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    precision: str = "fp32",
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Leading singular vectors of each weight from Lanczos steps that start at the given ones, which are not changed.

    Returns:
        Lists of u, v (shapes as given) and the group that attains sigma (scalar int64).
    """
    with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
        weights = [w.detach() for w in weights]
        starts = [
            # A vector of zeros, as of a state that was never started, starts nothing.
            torch.where(given.abs().amax() > 0, given, drawn.to(given.dtype)).to(drawn.device)
            for given, drawn in zip(starts_of(us, vs), random_starts(weights, decode(geometry)))
        ]
        for _ in range(ROUNDS):
            found_u, found_v = lanczos_start(weights, starts, geometry, LANCZOS_STEPS)
            found_u, found_v, _, groups = power_step(weights, found_u, found_v, geometry, POWER_STEPS, precision)
            starts = starts_of(found_u, found_v)
        return [u.clone() for u in found_u], [v.clone() for v in found_v], [g.clone() for g in groups]


def _fake(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    precision: str = "fp32",
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    found_u = [w.new_empty(u.shape, dtype=compute_dtype(w)) for w, u in zip(weights, us)]
    found_v = [w.new_empty(v.shape, dtype=compute_dtype(w)) for w, v in zip(weights, vs)]
    return found_u, found_v, [w.new_empty((), dtype=torch.int64) for w in weights]


singular_vectors = define(
    "singular_vectors(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] geometry, str precision='fp32')"
    " -> (Tensor[], Tensor[], Tensor[])",
    _singular_vectors,
    _fake,
)


def _batched(
    info: object,
    in_dims: Sequence[Any],
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    precision: str = "fp32",
) -> tuple[tuple[list[Tensor], ...], tuple[list[int], ...]]:
    """Rule of torch.func.vmap: every sample is an operator of its own, all in one call."""
    size: int = info.batch_size  # type: ignore[attr-defined]

    def samples(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
        parts = [[t] * size if dim is None else list(t.unbind(dim)) for t, dim in zip(tensors, dims)]
        return [part for sample in zip(*parts) for part in sample]

    columns = [samples(tensors, dims) for tensors, dims in zip((weights, us, vs), in_dims)]
    found = singular_vectors(*columns, list(geometry) * size, precision)
    n = len(weights)
    stacked = tuple([torch.stack(list(part[i::n])) for i in range(n)] for part in found)
    return stacked, tuple([0] * n for _ in stacked)


torch.library.register_vmap("sn_fast::singular_vectors", _batched, lib=LIBRARY)
