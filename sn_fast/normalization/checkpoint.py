"""What is found in a checkpoint, brought into the form of the parametrization's own state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers.linear import whole_window_size
from ..reference.linear_map import compute_dtype, matvec, rmatvec
from ..reference.power import normalized

if TYPE_CHECKING:
    from .parametrization import SpectralNorm

# A stored sigma that is this far from what the stored u gives does not belong to the stored weight.
_MISMATCH = 1e-2


def translate(p: SpectralNorm, state_dict: dict[str, Any], prefix: str) -> bool:
    """Make the stored entries those of ``p``; returns whether they hold singular vectors of its operator.

    Known are our own entries, also of a layer that had not seen an input or had another ``gradient``, and those of
    torch.nn.utils.parametrizations.spectral_norm (``_u``, ``_v``). Where nothing is stored it is left to the caller's
    ``strict`` to complain.
    """
    stored = {name: state_dict.pop(f"{prefix}_{name}", None) for name in ("u", "v")}
    foreign = all(value is not None for value in stored.values())
    if not foreign:
        stored = {name: state_dict.get(prefix + name) for name in ("u", "v")}
        if any(value is None for value in stored.values()):
            return False
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
    if v.numel() == 0 or p.geometry is None or (foreign and not fits):
        state_dict.update(own)  # nothing there, or vectors of the reshaped kernel, which say nothing of a convolution
        return False
    if foreign:
        state_dict.update({prefix + "u": u, prefix + "v": v})
    incomplete = own.keys() - state_dict.keys()
    if incomplete:  # what is missing is recomputed at the next use, which a sigma of NaN brings about
        state_dict.update({key: own[key] for key in incomplete})
        state_dict[prefix + ("estimate" if p.options.bound else "sigma")] = torch.full_like(p.sigma, math.nan)
    return True


def belongs(p: SpectralNorm) -> bool:
    """Whether the state is that of the weight: sigma = |A^T u| (|A v| for a matrix), with unit u and v.

    False for NaN, and after an average of checkpoints, which shrinks u and v.
    """
    if p.raw.is_meta:
        return True
    with torch.no_grad():
        weight = p.operand(p.raw)
        weight = weight.to(compute_dtype(weight))
        geometry = p.known_geometry
        start, back = (p.u, rmatvec) if geometry.axes else (p.v, matvec)
        start = start[None].to(weight.dtype)
        image = back(start, weight, geometry)
        _, norms = normalized(image, image, geometry.groups)
        _, lengths = normalized(start, start, geometry.groups)
        sigma = p.iterated_sigma.to(weight.dtype)
        fits = (norms.amax() - sigma).abs() <= _MISMATCH * sigma
        return bool(fits & ((lengths - 1).abs().amax() <= _MISMATCH))


def _adopt_sizes(p: SpectralNorm, u: Tensor, v: Tensor) -> None:
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
            p.set_geometry(geometry)
            like = p.raw.detach().new_empty((), dtype=compute_dtype(p.raw))
            p.u, p.v, p.sigma = like.new_zeros(u.shape), like.new_zeros(v.shape), like.new_zeros(())
            if p.options.bound:
                p.estimate = like.new_zeros(())
            if p.options.full:
                p.register_buffer(p.previous_name, like.new_zeros(u.shape if p.as_matrix else v.shape))
            return
