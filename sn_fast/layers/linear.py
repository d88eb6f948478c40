"""The operator of a module, and the weights that modules hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..reference.geometry import Geometry
from .kinds import conv_operator, kind_of, nominal_size, whole_window_size
from .operators import LinearOperator
from .weighted import (
    ConvOperator,
    LayerOperator,
    MatrixOperator,
    as_int,
    check_weight,
    in_precision,
    layer_operator,
    per_axis,
)

__all__ = [
    "ConvOperator",
    "LayerOperator",
    "LinearOperator",
    "MatrixOperator",
    "as_int",
    "chain",
    "check_weight",
    "checked_weight",
    "conv_operator",
    "in_precision",
    "layer_operator",
    "nominal_size",
    "operator_of",
    "per_axis",
    "raw_weight",
    "whole_window_size",
]


def operator_of(
    module: nn.Module, input_size: int | Sequence[int] | None = None, *, raw: bool = False
) -> LinearOperator:
    """The operator of a layer: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding, or anything with a 2-D weight.

    Args:
        module: the layer. An Embedding maps a one-hot vector to its row.
        input_size: spatial size of a convolution's input. May be left out where spectral normalisation knows it.
        raw: of the raw weight below the parametrizations; else of the weight in use.

    Raises:
        ValueError: the input size of a convolution is not known. TypeError: the module has no such weight.
    """
    weight = raw_weight(module) if raw else getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor; give a Linear, convolution or Embedding layer")
    kind = kind_of(module)
    if kind is None:
        return MatrixOperator(weight)
    if kind.axes and input_size is None:
        known = _known_geometry(module)
        if known is not None:
            return LayerOperator(weight, known)
    return kind.operator(module, weight, input_size)


def raw_weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The raw tensor below the parametrizations of ``module.name``, or the plain attribute."""
    if parametrize.is_parametrized(module, name):
        return chain(module, name).original
    return getattr(module, name, None)


def chain(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    """The parametrizations of ``module.name``, which must have some (KeyError).

    By hand: this is asked for many times in a step, and nn.Module's own attribute look-ups take ten times as long.
    """
    lists: Any = module._modules["parametrizations"]
    found: parametrize.ParametrizationList = lists._modules[name]
    return found


def _known_geometry(module: nn.Module) -> Geometry | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    for parametrization in chain(module, "weight"):
        geometry = getattr(parametrization, "layer_geometry", None)
        if isinstance(geometry, Geometry) and geometry.axes:
            return geometry
    return None


def checked_weight(module: nn.Module, name: str) -> Tensor:
    """The parameter of this name, not parametrized yet; raises where there is none that has a norm."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; give a torch.nn.Module")
    if parametrize.is_parametrized(module, name):
        theirs = [type(p).__name__ for p in chain(module, name)]
        raise ValueError(
            f"{type(module).__name__}.{name} is already parametrized by {', '.join(theirs)}; remove that first, with "
            + ("remove_spectral_norm" if theirs == ["SpectralNorm"] else "torch.nn.utils.parametrize")
        )
    weight = raw_weight(module, name)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(module).__name__}.{name} is a lazy parameter without a shape; run one forward first")
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(f"{type(module).__name__}.{name} is on the meta device; load or initialise the weights first")
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; give a layer with a weight, or name=")
    check_weight(weight, dims=range(2, 6))
    return weight
