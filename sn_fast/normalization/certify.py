"""sigma as a certified bound (``bound=True``), proven anew whenever the weight has changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..norms.layer_bound import certified_sigma
from ..ops.library import define
from ..reference.geometry import Geometry, decode
from .state import State


def certify(member: State, weight: Tensor) -> None:
    """Write into ``sigma`` a bound of the norm of this weight's operator, rounded up."""
    certify_operand(member, member.operand(weight))


def certify_operand(member: State, operand: Tensor) -> None:
    """``certify`` for a weight in the form that the operators take."""
    sigma, geometries = member.state("sigma"), _geometries(member)
    member.bound_code = _code(geometries)
    bound = certified_sigma(operand, geometries, every_size=member.every_size)
    sigma.fill_(_rounded_up(bound, sigma.dtype))


def certified(member: State, operand: Tensor, changed: Tensor, index: int) -> Tensor:
    """``certify`` as an operator, where ``changed[index]``; returns a copy of sigma for one forward."""
    sigma = member.state("sigma")
    fresh = torch.empty_like(sigma)
    _certify(operand, sigma, fresh, changed, index, member.bound_code, member.every_size)
    return fresh


def certified_norm(member: State, operand: Tensor) -> Tensor:
    """The bound for a weight that is not the module's own."""
    return _certified_norm(operand, member.bound_code, member.every_size)


def _geometries(member: State) -> list[Geometry]:
    """All for which the norm is bounded."""
    geometry = member.layer_geometry
    assert geometry is not None
    found = {geometry}
    if geometry.mode != "zeros" and not member.every_size:  # else the largest size has the largest norm
        found |= {member.geometry_for(size) for size in member.sizes}
    return list(found)


def _code(geometries: Iterable[Geometry]) -> list[int]:
    return [c for geometry in geometries for c in geometry.encode()]


def _rounded_up(value: float, dtype: torch.dtype) -> float:
    rounded = torch.tensor(value, dtype=dtype)
    return float(rounded if float(rounded) >= value else torch.nextafter(rounded, torch.tensor(math.inf, dtype=dtype)))


def _certify_if_changed(
    weight: Tensor,
    sigma: Tensor,
    fresh: Tensor,
    changed: Tensor,
    index: int,
    geometry: Sequence[int],
    every_size: bool,
) -> None:
    with torch.no_grad():
        if bool(changed[index]):
            sigma.fill_(_rounded_up(certified_sigma(weight, decode(geometry), every_size=every_size), sigma.dtype))
        fresh.copy_(sigma)


_certify = define(
    "certify(Tensor weight, Tensor(a!) sigma, Tensor(b!) fresh, Tensor changed, int index, int[] geometry,"
    " bool every_size) -> ()",
    _certify_if_changed,
    lambda *args: None,
)


def _bound(weight: Tensor, geometry: Sequence[int], every_size: bool) -> Tensor:
    with torch.no_grad():
        weight = weight.detach()
        bound = certified_sigma(weight, decode(geometry), every_size=every_size)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.tensor(_rounded_up(bound, dtype), dtype=dtype, device=weight.device)


_certified_norm = define(
    "certified_norm(Tensor weight, int[] geometry, bool every_size) -> Tensor",
    _bound,
    lambda weight, *_: weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32)),
)


def _batched(
    info: object, in_dims: tuple[int | None, ...], weight: Tensor, geometry: Sequence[int], every_size: bool
) -> tuple[Tensor, int]:
    """Rule of torch.func.vmap."""
    dim = in_dims[0]
    assert dim is not None
    return torch.stack([_certified_norm(w, geometry, every_size) for w in weight.unbind(dim)]), 0


torch.library.register_vmap("sn_fast::certified_norm", _batched)
