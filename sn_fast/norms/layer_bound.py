"""What a layer's weight has to be divided by, so that its norm is provably at most 1 after rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..layers.weighted import LayerOperator
from ..reference.geometry import Geometry
from .bound import BoundMethods

_ROUNDINGS = 6  # of one element: sigma, sigma / beta, the quotient, and its storage in the weight's dtype
_TIGHTNESS = 1.01


def certified_sigma(weight: Tensor, geometries: Iterable[Geometry], *, every_size: bool) -> float:
    """A number s, such that ``weight`` / s, rounded to the weight's dtype, has norm at most 1. NaN for a NaN weight.

    Args:
        weight: of the layer, or its matrix.
        geometries: for which the norm is bounded, all of them; or, with ``every_size``, one of them.
        every_size: bound the norm for every input size.
    """
    if not bool(torch.isfinite(weight).all()):
        return math.nan
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return max(_sigma(LayerOperator(weight, g), every_size) for g in geometries)


def layer_bound(op: LayerOperator, *, every_size: bool) -> float:
    """A bound of the operator's norm at its own input size, or at every one."""
    search = BoundMethods(op, _TIGHTNESS, every_size=every_size)
    norm, _ = search.fft(None) if every_size else search.auto()
    return norm


def _sigma(op: LayerOperator, every_size: bool) -> float:
    # Rounding changes an element by a few units, and so the norm by a few units of the norm of |W|.
    absolute, _ = BoundMethods(op, _TIGHTNESS, every_size=every_size).rowsum()
    return layer_bound(op, every_size=every_size) + _ROUNDINGS * torch.finfo(op.weight.dtype).eps * absolute
