"""What is found in a checkpoint, brought into the form of the parametrization's own state."""

from __future__ import annotations

import enum
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import users_stacklevel
from ..layers.linear import whole_window_size
from ..ops.library import kernels_of
from ..ops.precision import resolved
from ..ops.records import REPLACED
from ..reference.linear_map import compute_dtype, matvec, rmatvec
from ..reference.power import normalized, sigma_through_last_iteration
from .state import State

# Vectors and a sigma that fit each other worse than this do not belong to the stored weight; products of bfloat16
# numbers leave 2e-3.
_MISMATCH = 5e-3


_ROUNDING = 50  # epsilons: what repeating an iteration's last product can change


class Loaded(enum.Enum):
    """A loaded state is that of the weight; or of the weight before a step; or has nothing to do with it."""

    CURRENT = enum.auto()
    BEHIND = enum.auto()
    FOREIGN = enum.auto()


class Stored(enum.Enum):
    """What a checkpoint holds of a state: nothing, some of it, vectors without all that goes with them, or all."""

    NOTHING = enum.auto()
    PART = enum.auto()
    VECTORS = enum.auto()
    STATE = enum.auto()


def translate(p: State, state_dict: dict[str, Any], prefix: str, load: object) -> Stored:
    """Make the stored entries those of ``p``; returns what there was.

    Known are our own entries, also of a layer that had not seen an input or had another ``gradient``, and those of
    torch.nn.utils.parametrizations.spectral_norm (``_u``, ``_v``). Vectors that do not fit, as those of another input
    size, are left out, with one warning for each ``load`` (any object that stands for it). Where nothing is stored it
    is left to the caller's ``strict`` to complain.
    """
    stored = {name: state_dict.pop(f"{prefix}_{name}", None) for name in ("u", "v")}
    foreign = all(value is not None for value in stored.values())
    if not foreign:
        stored = {name: state_dict.get(prefix + name) for name in ("u", "v")}
        if any(value is None for value in stored.values()):
            # With strict=False what there is is loaded, and then fits neither the rest nor the weight.
            return Stored.PART if any(prefix + name in state_dict for name in p._buffers) else Stored.NOTHING
    u, v = stored["u"], stored["v"]
    if p.geometry is None and v.numel():
        _adopt_sizes(p, u, v)
    own = {prefix + name: buffer for name, buffer in p._buffers.items()}
    if prefix + "estimate" not in own and prefix + "estimate" in state_dict:
        state_dict[prefix + "sigma"] = state_dict[prefix + "estimate"]  # of a layer with bound=True
    for name in ("u_prev", "v_prev", "top_group", "estimate"):  # of a layer with other options, or none
        if prefix + name not in own:
            state_dict.pop(prefix + name, None)
    fits = u.shape == p.u.shape and v.shape == p.v.shape
    if v.numel() == 0 or p.geometry is None or not fits:
        # Nothing there, or vectors of another operator: of the reshaped kernel (torch's), of another input size.
        if not fits and v.numel() and p.geometry is not None and not foreign:
            _say_once(p, u, v, load)
        state_dict.update(own)
        return Stored.NOTHING
    if foreign:
        state_dict.update({prefix + "u": u, prefix + "v": v})
    incomplete = own.keys() - state_dict.keys()
    state_dict.update({key: own[key] for key in incomplete})
    return Stored.VECTORS if incomplete else Stored.STATE


_said: object = None  # the load that a warning was given for


def _say_once(p: State, u: Tensor, v: Tensor, load: object) -> None:
    global _said
    if _said is load:
        return
    _said = load
    warnings.warn(
        f"sn_fast: the checkpoint's singular vectors have shapes u {tuple(u.shape)} and v {tuple(v.shape)}, this "
        f"{type(p.module).__name__} needs u {tuple(p.u.shape)} and v {tuple(p.v.shape)} (another input size?); they "
        "are left out, here and in other layers like it, and sigma is computed anew from the loaded weight",
        stacklevel=users_stacklevel(),
    )


def are_unit(p: State) -> bool:
    """Whether u and v are unit vectors, in each group; on meta they may be."""
    if p.u.is_meta:
        return True
    for x in (p.u, p.v):
        if not x.numel():  # never started
            return False
        _, lengths = normalized(x[None].to(compute_dtype(x)), x[None].to(compute_dtype(x)), p.known_geometry.groups)
        if not bool((lengths - 1).abs().amax() <= _MISMATCH):
            return False
    return True


def belongs(p: State, weight: Tensor, *, with_sigma: bool = True) -> bool:
    """Whether the state is that of the weight, as far as products in low precision tell; ``misfit`` says how."""
    return misfit(p, weight, with_sigma=with_sigma) <= _MISMATCH


def misfit(p: State, weight: Tensor, *, with_sigma: bool = True) -> float:
    """How far the state is from |A^T u - sigma v| = 0 (|A v - sigma u| for a matrix), as a share.

    An iteration leaves it at zero, converged or not. NaN and vectors that are no units give inf; an average of
    checkpoints is far off, for the averages of u and v are no vectors of the averaged weight. So do a sigma below zero,
    and a group that does not attain it. ``with_sigma=False``: of u and v alone.
    """
    with torch.no_grad():
        if not are_unit(p):
            return math.inf
        geometry = p.known_geometry
        operand = p.operand(weight)
        operand = operand.to(compute_dtype(operand))
        start, end, back = (p.u, p.v, rmatvec) if geometry.axes else (p.v, p.u, matvec)
        image = back(start[None].to(operand.dtype), operand, geometry)
        directions, norms = normalized(image, end[None].to(operand.dtype), geometry.groups)
        sigma = p.state(p.iterated_name).to(operand.dtype) if with_sigma else norms.amax()
        away = (directions[0] - end.to(operand.dtype)).reshape(geometry.groups, -1).norm(dim=1)
        # A group that hardly counts has vectors that rounding moves.
        away = away * (norms[0] > _MISMATCH * sigma)
        off = (norms.amax() - sigma).abs()
        if with_sigma:
            if not (sigma >= 0 and _attains(p, norms[0])):
                return math.inf
            if p.options.full:  # the gradient is that of the iteration from there
                previous = p.state(p.previous_name)
                off = off.maximum((sigma_through_last_iteration(operand, previous, geometry) - sigma).abs())
        share = float(torch.where(off == 0, 0.0, off / sigma).maximum(away.amax() / 2))
        return math.inf if math.isnan(share) else share


def _attains(p: State, norms: Tensor) -> bool:
    """Whether the group that is stored is one with the largest of the groups' norms."""
    group = p.buffer("top_group")
    if group is None:
        return True
    return 0 <= int(group) < len(norms) and bool(norms[int(group)] >= (1 - _MISMATCH) * norms.amax())


def judge(p: State, weight: Tensor, *, with_sigma: bool = True) -> Loaded:
    """What a state that was loaded is to the weight that was loaded with it; ``with_sigma=False``: u and v alone.

    Saving a sharded model gathers nothing, so the state that it saves may be one step of training behind the weight.
    """
    found = misfit(p, weight, with_sigma=with_sigma)
    if with_sigma and found <= _rounding(p, weight):
        return Loaded.CURRENT
    return Loaded.BEHIND if found <= REPLACED else Loaded.FOREIGN


def _rounding(p: State, weight: Tensor) -> float:
    """The misfit that the arithmetic of an iteration leaves."""
    exact = kernels_of(weight.device) is None or resolved(p.options.product_precision) in ("fp32", "3xtf32")
    return _ROUNDING * torch.finfo(compute_dtype(weight)).eps if exact else _MISMATCH


def _adopt_sizes(p: State, u: Tensor, v: Tensor) -> None:
    """Take the geometry of a layer that has not seen an input yet from the shapes of stored vectors, if one fits."""
    if p.as_matrix or v.ndim != p.raw.ndim - 1:
        return
    literal = tuple(v.shape[1:])
    whole = tuple(w or s for w, s in zip(whole_window_size(p.module), literal))
    extent = tuple(d * (k - 1) + 1 for d, k in zip(p.module.dilation, p.module.kernel_size))  # type: ignore[arg-type]
    # A collapsed axis stores one window: of windows apart from each other, or of the only one.
    for size in (whole, literal, tuple(e if n == 1 else s for e, s, n in zip(extent, literal, u.shape[1:]))):
        try:
            geometry = p.geometry_for(size)
        except ValueError:
            continue
        iterated = geometry.reduced() if p.options.reduce else geometry
        if (iterated.out_shape(p.raw.shape), iterated.in_shape(p.raw.shape)) == (u.shape, v.shape):
            p.set_geometry(geometry, p.raw)
            p.allocate(p.raw.detach())
            return
