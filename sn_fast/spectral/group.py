"""Parametrizations that advance together, and the advance itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops import spectral as ops

if TYPE_CHECKING:
    from .parametrization import SpectralNorm


class Group:
    """Parametrizations that are refreshed together, in one operator call. Copies of a model get groups of their own.

    Members are held weakly, and count only as long as they sit on a weight: a layer that has been replaced in the
    model is neither kept alive nor iterated.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[SpectralNorm]] = []

    def add(self, member: SpectralNorm) -> None:
        self._members.append(weakref.ref(member))

    def members(self) -> list[SpectralNorm]:
        found = [m for m in (reference() for reference in self._members) if m is not None and m.is_attached()]
        if len(found) < len(self._members):
            self._members = [weakref.ref(m) for m in found]
        return found

    def refresh(self) -> None:
        """Advance every member whose raw weight has moved."""
        stale = [m for m in self.members() if m.is_stale()]
        if stale:
            advance(stale)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group()  # each copied member joins the new group itself; deepcopy's memo makes it one for all


class WeightMark:
    """Which weight, in which state, u, v and sigma belong to."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weakref.ref(weight)
        self._version = _version(weight)
        self._placement = _placement(weight)
        self._address = _address(weight)

    def fits(self, weight: Tensor) -> bool:
        """Whether ``weight`` is that tensor, unwritten. A move to another dtype, device or layout is no change."""
        if self._weight() is not weight or self._version != _version(weight):
            return False
        return self._placement != _placement(weight) or self._address == _address(weight)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _placement(weight: Tensor) -> tuple[object, ...]:
    return weight.dtype, weight.device, weight.stride()


def _address(weight: Tensor) -> int:
    """Tells a weight whose ``.data`` was replaced; 0 where there is no memory to have an address."""
    return weight.data_ptr() if type(weight) is nn.Parameter and not weight.is_meta else 0


def advance(members: Iterable[SpectralNorm], n_power_iterations: int | None = None) -> None:
    """Advance u, v, sigma of these parametrizations, all that share a device and a number of iterations in one call."""
    batches: dict[tuple[torch.device, int, bool], list[SpectralNorm]] = {}
    for m in members:
        n = n_power_iterations or m.options.n_power_iterations
        batches.setdefault((m.u.device, n, m.options.full), []).append(m)
    with torch.no_grad():
        for (_, n, full), batch in batches.items():
            weights = [m.operand(m.raw) for m in batch]
            us, vs = [m.u for m in batch], [m.v for m in batch]
            code = [c for m in batch for c in m.code]
            if full and n > 1:
                us, vs, _, _ = ops.power_step(weights, us, vs, code, n - 1, "fp32")
            if full:
                for m, u, v in zip(batch, us, vs):
                    m.previous.copy_(u if m.as_matrix else v)
            us, vs, sigmas, groups = ops.power_step(weights, us, vs, code, 1 if full else n, "fp32")
            for m, u, v, sigma, group in zip(batch, us, vs, sigmas, groups):
                m.u.copy_(u)
                m.v.copy_(v)
                m.sigma.copy_(sigma)
                top_group = m.buffer("top_group")
                if top_group is not None:
                    top_group.copy_(group)
                if not torch.compiler.is_compiling():
                    m.mark_current()


def _bump_versions_after_fused_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write their parameters without bumping ``_version``: do it for them."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_bump_versions_after_fused_step)
