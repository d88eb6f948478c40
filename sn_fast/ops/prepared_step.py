"""Power iterations of a model's own state, in place, with all that does not change from call to call found before."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .library import kernels_of, stream_of
from .plan import Plan
from .power_step import images_of, plans_of, starts_of
from .precision import PRECISIONS
from .records import REPLACED, record_plan
from .tables import Tables

_ALIGNED = 256  # bytes


class Refreshed(NamedTuple):
    """What a refresh leaves beside the state: copies for one forward, and what had changed."""

    changes: Tensor  # (n + 1,) int32: of each operator 0, 1 (moved) or 2 (replaced), and how many are not 0
    sigmas: list[Tensor]
    us: list[Tensor]  # empty where no vectors were asked for
    vs: list[Tensor]
    groups: list[Tensor]  # (n,) scalars; of ungrouped operators without meaning


class PreparedStep:
    """``power_step`` of fixed tensors: u, v, sigma and group are written where they are. See ``prepare``.

    One call is a memset and three kernels, and on the host as little as that takes; ``refresh`` needs one kernel more.
    It is for tensors that stay: it keeps addresses, and the caller sees to it that they are still those of its tensors.
    """

    def __init__(
        self,
        module: ModuleType,
        plan: Plan,
        weights: Sequence[Tensor],
        states: tuple[Sequence[Tensor], Sequence[Tensor]],
        targets: Tables,
        precision: str,
    ) -> None:
        self._plan, self._targets = plan, targets
        starts, images = starts_of(*states), images_of(*states)
        self._like = [torch.empty_like(x, device="meta") for x in (*images, *starts)]
        self._u_is_image = [u.dim() > 1 for u in states[0]]
        self._weights = [w.data_ptr() for w in weights]
        vectors = [[x.data_ptr() for x in xs] for xs in (starts, images)]
        (target,) = targets.addresses()
        code = PRECISIONS.index(precision)
        self._refresh = module.Refresh(
            *(plan.tables.addresses(), plan.n_items, plan.n_slices, self._weights, *vectors),
            *(target, plan.n_counters, code),
        )
        self.records = record_plan(module, weights)
        zeroed = 0 if self.records is None else self.records.zeroed_bytes
        # One allocation holds everything: results of both half steps, their norms, partial sums; then what a call
        # begins with as zeros: sums, changes and arrivals of the comparison, counters.
        sizes = [4 * n for n in plan.result_sizes]
        sizes += [8 * sum(plan.norm_sizes), 4 * plan.partial_size, zeroed + 4 * plan.n_counters]
        ends = np.cumsum([-(-size // _ALIGNED) * _ALIGNED for size in sizes]).tolist()
        self._offsets, self._size = [0, *ends[:-1]], ends[-1]
        # Where a weight was replaced: written by the device, read by the host when it comes by.
        self.alarms = torch.zeros(len(weights), dtype=torch.int32, device=plan.device)

    def run(self, n_iterations: int) -> None:
        """That many iterations of all operators, on the current stream."""
        self._call(n_iterations, None)

    def refresh(
        self, n_iterations: int, records: Sequence[Tensor], *, copies: bool, vectors: bool = False, force: bool = False
    ) -> Refreshed:
        """Iterate the operators whose weight differs from its record, or all if ``force``, and renew the records.

        ``copies``: of all sigmas, and with ``vectors`` of all u, v and groups too, whether or not they have changed.
        Nothing waits for the device.
        """
        return self._call(n_iterations, records, copies=copies, vectors=copies and vectors, force=force)

    def _call(
        self,
        n_iterations: int,
        records: Sequence[Tensor] | None,
        *,
        copies: bool = False,
        vectors: bool = False,
        force: bool = False,
    ) -> Refreshed:
        plan, device, n = self._plan, self._plan.device, len(self._weights)
        scratch = torch.empty(self._size, dtype=torch.uint8, device=device)
        base = scratch.data_ptr()
        first, second, norms, partials, zeroed = [base + offset for offset in self._offsets]
        plan.tables.addresses(), self._targets.addresses()  # for this stream, or the graph under capture
        content, counters, changes = None, zeroed, scratch[:0]
        if records is not None:
            there = self.records
            assert there is not None
            counters = zeroed + there.zeroed_bytes
            place = self._offsets[-1] + there.zeroed[1]
            changes = scratch[place : place + 4 * (n + 1)].view(torch.int32)
            content = (
                *(there.tables.addresses(), there.n_units, self._weights, [r.data_ptr() for r in records]),
                *([zeroed + offset for offset in there.zeroed], there.zeroed_bytes + 4 * plan.n_counters),
                *(self.alarms.data_ptr(), force, REPLACED**2),
            )
        places, found = [0, 0, 0, 0], Refreshed(changes, [], [], [], [])
        if copies:
            found, places = self._copies(changes, vectors)
        self._refresh.run(
            *(n_iterations, (first, second), (norms, norms + 8 * plan.norm_sizes[0]), partials, counters),
            *(places, content, stream_of(device)),
        )
        return found

    def _copies(self, changes: Tensor, vectors: bool) -> tuple[Refreshed, list[int]]:
        """Memory for copies of the state, as tensors and as addresses."""
        plan, n = self._plan, len(self._weights)
        sizes = plan.result_sizes if vectors else [0, 0]
        flat = torch.empty(n + sum(sizes), dtype=torch.float32, device=plan.device)
        base = flat.data_ptr()
        sigmas = list(flat[:n].unbind())
        if not vectors:
            return Refreshed(changes, sigmas, [], [], []), [base, 0, 0, 0]
        parts = torch._utils._unflatten_dense_tensors(flat[n:], self._like)
        images, starts = parts[:n], parts[n:]
        us, vs = zip(*((i, s) if image else (s, i) for image, i, s in zip(self._u_is_image, images, starts)))
        groups = torch.empty(n, dtype=torch.int64, device=plan.device)
        addresses = [base, base + 4 * n, base + 4 * (n + sizes[0]), groups.data_ptr()]
        return Refreshed(changes, sigmas, list(us), list(vs), list(groups.unbind())), addresses


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
    return PreparedStep(module, plan, weights, (us, vs), targets, precision)
