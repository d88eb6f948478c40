"""Power iterations of a model's own state, in place, with all that does not change from call to call found before."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .library import kernels_of, stream_of
from .plan import Plan
from .power_step import images_of, plans_of, starts_of
from .precision import PRECISIONS
from .tables import Tables

_ALIGNED = 256  # bytes


class PreparedStep:
    """``power_step`` of fixed tensors: u, v, sigma and group are written where they are. See ``prepare``.

    One call is a memset and three kernels, and on the host as little as that takes. It is for tensors that stay: it
    keeps addresses, and the caller sees to it that they are still those of its tensors.
    """

    def __init__(
        self,
        module: ModuleType,
        plan: Plan,
        weights: Sequence[Tensor],
        vectors: tuple[list[Tensor], list[Tensor]],
        targets: Tables,
        precision: str,
    ) -> None:
        self._module, self._plan, self._targets = module, plan, targets
        self._weights = [w.data_ptr() for w in weights]
        self._vectors = [[x.data_ptr() for x in xs] for xs in vectors]
        self._precision = PRECISIONS.index(precision)
        # One allocation holds everything: results of both half steps, their norms, partial sums, counters.
        sizes = [4 * n for n in plan.result_sizes]
        sizes += [8 * sum(plan.norm_sizes), 4 * plan.partial_size, 4 * plan.n_counters]
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes]).tolist()
        self._offsets, self._size = [0, *ends[:-1]], ends[-1]

    def run(self, n_iterations: int) -> None:
        """That many iterations, on the current stream."""
        plan, device = self._plan, self._plan.device
        scratch = torch.empty(self._size, dtype=torch.uint8, device=device)
        base = scratch.data_ptr()
        first, second, norms, partials, counters = [base + offset for offset in self._offsets]
        addresses, stream = plan.tables.addresses(), stream_of(device)
        (targets,) = self._targets.addresses()
        for _ in range(n_iterations):
            self._module.power_step(
                addresses,
                plan.n_units,
                plan.n_pieces,
                self._weights,
                *self._vectors,
                (first, second),
                0,
                0,
                targets,
                (norms, norms + 8 * plan.norm_sizes[0]),
                partials,
                counters,
                plan.n_counters,
                self._precision,
                stream,
            )


def prepare(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor | None],
    geometry: Sequence[int],
    precision: str,
) -> PreparedStep | None:
    """None where there are no kernels for this, or where ``power_step`` has to copy something first.

    Shapes as in ``reference.power.power_step``; ``groups``: where the number of the group that attains sigma goes.
    """
    device = weights[0].device
    module = kernels_of(device)
    if module is None or precision not in PRECISIONS:
        return None
    states = [*us, *vs, *sigmas]
    if any(t.device != device for t in (*weights, *states)):
        return None
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in states):
        return None
    if any(g is not None and (g.dtype != torch.int64 or g.device != device) for g in groups):
        return None
    plans = plans_of(module, "power_step", weights, geometry)
    if plans is None or len(plans) > 1:
        return None
    (plan,) = plans
    if [(tuple(u.shape), tuple(v.shape)) for u, v in zip(us, vs)] != plan.shapes:
        return None
    addresses = [[s.data_ptr(), 0 if g is None else g.data_ptr()] for s, g in zip(sigmas, groups)]
    targets = Tables([np.array(addresses, np.int64)], device)
    return PreparedStep(module, plan, weights, (starts_of(us, vs), images_of(us, vs)), targets, precision)
