"""spectral_norm_summary: what is normalised, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import ROUND_CEILING
from itertools import chain as chained

import torch
from torch import Tensor, nn

from ..layers.describe import aligned, rounded, times, window
from ..layers.kinds import kind_of
from ..layers.linear import LayerOperator, chain, is_of_weight, operator_of
from ..layers.observe import evaluating
from ..norms.bound import operator_norm_bound
from ..norms.layer_bound import layer_bound
from ..reference.geometry import Geometry
from .gathered import gathered, is_away
from .model import normalised_modules
from .parametrization import SpectralNorm
from .tensor_parallel import DistributedSpectralNorm, distributed, together

_HEAD = ("layer", "operator", "sigma", "beta", "mode", "norm in use at most")
_RIGHT = frozenset({2, 3, 5})


def spectral_norm_summary(model: nn.Module) -> str:
    """A table of every layer that sn_fast normalises.

    Columns: the layer; the operator whose norm is sigma, with the input size; sigma of the raw weight; beta and mode;
    and a certified upper bound of that operator's norm for the weight in use (``operator_norm_bound``, rounded up). A
    convolution with operator="reshape" has all this of its reshaped kernel, whose norm is not that of the layer. Where
    a layer's forward or hooks were replaced since, the bound is that of the map that runs, or said to be unknown.

    >>> print(spectral_norm_summary(model))
    layer  operator             sigma  beta  mode  norm in use at most
    conv1  conv 3x3 at 32x32  1.92214     1  cap               1.00034
    fc     matrix 10x2048     0.94313     1  cap              0.943133
    """
    found: dict[SpectralNorm, tuple[str, nn.Module, str]] = {
        p: (path if name == "weight" else f"{path}.{name}".lstrip("."), module, name)
        for path, module, name in normalised_modules(model)
        for p in chain(module, name)
        if isinstance(p, SpectralNorm)
    }
    away = [p for p in found if is_away(p)]
    rows: dict[SpectralNorm, tuple[str, ...]] = {}
    together(distributed(found), "spectral_norm_summary(model)")
    with evaluating(model), torch.no_grad():
        for p in chained([p for p in found if p not in away], _gathered(model, away)):
            label, module, name = found[p]
            weight = getattr(module, name)
            rows[p] = _cells(label, p, weight.full_tensor() if isinstance(p, DistributedSpectralNorm) else weight)
    if not rows:
        return "no layer is normalised by sn_fast"
    return "\n".join(aligned([_HEAD, *(rows[p] for p in found)], _RIGHT))


def _gathered(model: nn.Module, away: Sequence[SpectralNorm]) -> Iterator[SpectralNorm]:
    parts: list[DistributedSpectralNorm] = []
    for pairs in gathered(model, "spectral_norm_summary(model)", away, parallel=parts.extend):
        yield from [p for p in away if p in parts or any(p is member for member, _ in pairs)]
        parts.clear()


def _cells(name: str, p: SpectralNorm, weight: Tensor) -> tuple[str, ...]:
    options = p.options
    sigma, bound = "-", "-"
    if p.layer_geometry is not None:
        sigma = f"{float(p.sigma):.6g}"
        op = LayerOperator(p.operand(weight), p.layer_geometry)
        own = _own_map(p, op)
        bound = rounded(layer_bound(op, every_size=p.every_size), ROUND_CEILING) if own is None else own
    return name or "(the layer)", _operator(p), sigma, f"{options.beta:g}", options.mode, bound


def _own_map(p: SpectralNorm, op: LayerOperator) -> str | None:
    """The bound of a layer whose class, attributes or hooks have come to make another map; None where ``op`` is it."""
    kind = kind_of(p.module)
    if kind is None or p.options.operator != "conv" or not _is_of_module(p):
        return None
    if kind.why_not_exact(p.module) is None:
        return None
    try:
        own = operator_of(p.module, op.geometry.input_size or None)
        if is_of_weight(own, op) or (not op.geometry.axes and is_of_weight(own.T, op)):
            return None
        bound, info = operator_norm_bound(own, return_info=True)
    except ValueError:
        return "unknown: not its map"
    return rounded(float(bound), ROUND_CEILING) if info.certified and info.confidence == 1 else "unknown: not its map"


def _is_of_module(p: SpectralNorm) -> bool:
    """Whether a parametrization is that of its module's ``weight``."""
    try:
        return any(q is p for q in chain(p.module, "weight"))
    except KeyError:
        return False


def _operator(p: SpectralNorm) -> str:
    if p.as_matrix:
        kernel = "reshaped kernel " if p.raw.ndim > 2 else "matrix "
        return kernel + times(p.operand(p.raw).shape)
    kind = kind_of(p.module)
    assert kind is not None
    return f"{kind.name} {window(p.module)}{_place(p)}"


def _place(p: SpectralNorm) -> str:
    geometry: Geometry | None = p.layer_geometry
    if geometry is None:
        return ", input size not known before the first forward"
    return ", at every size" if p.every_size else f" at {times(geometry.input_size)}"
