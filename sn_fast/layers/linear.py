"""The operator of a module, and the weights that modules hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..reference.geometry import Geometry
from .applying import apply, probe, visible
from .exact import computes_weight
from .kinds import LayerKind, conv_operator, kind_of, nominal_size, whole_window_size
from .operators import LinearOperator, unscaled
from .traced import NotLinear, is_same_memory, table_operator, traced_operator
from .undisturbed import undisturbed
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
    """The operator of a layer: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding(Bag), and registered classes.

    It is that of the map that runs. A layer whose own forward, attributes or hooks change its class's map (weight
    standardisation, low-rank adapters, masks, a scaled output) is run, and its input followed: where one convolution or
    matrix is all that it goes through, the operator has the weight in use there; otherwise it is known by its products
    (docs/layers.md). A module of another class with a 2-D weight is measured in the same way.

    Args:
        module: the layer. An Embedding maps a one-hot vector to its row, an EmbeddingBag the counts of indices (their
            shares, with mode "mean") to the sum.
        input_size: spatial size of a convolution's input. May be left out where spectral normalisation knows it.
        raw: of the raw weight below the parametrizations; else of the weight in use, which is that of the next forward.

    Raises:
        ValueError: the input size of a convolution is not known, or the layer's map is not linear, or not known to be.
        TypeError: the module has no such weight.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    below = raw and parametrize.is_parametrized(module, "weight")
    weight = raw_weight(module) if below else weight_in_use(module)
    name = type(module).__name__
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} has no weight tensor; give a Linear, convolution or Embedding layer")
    if is_lazy(weight):
        raise ValueError(f"{name}.weight is a lazy parameter without a shape; run one forward first")
    kind = kind_of(module)
    geometry = _known_geometry(module) if input_size is None else None
    reason = f"{name} is not a class that sn_fast knows" if kind is None else kind.why_not_exact(module)
    if reason is None and kind is not None:
        if geometry is not None:
            if not kind.of_user:
                return LayerOperator(weight, geometry)
            input_size = geometry.input_size
        op = kind.operator(module, weight, input_size)
        if kind.of_user and not raw and not weight.is_meta:
            _check_declared(module, op)
        return op
    if kind is None and (weight.ndim != 2 or type(module).forward is nn.Module.forward):
        return MatrixOperator(weight)
    size = input_size if geometry is None else geometry.input_size
    try:
        op = _measured(module, kind, weight, size)
    except NotLinear as error:
        raise ValueError(
            f"this {name} has a map of its own ({reason}) that cannot be measured: {error}; "
            "define its operator with register_layer, or measure the matrix alone, MatrixOperator(module.weight)"
        ) from error
    if raw and kind is not None:
        if not is_of_weight(op, kind.operator(module, weight_in_use(module), size)):
            raise ValueError(f"raw=True: this {name} has a map of its own ({reason}), which is not that of its weight")
        return kind.operator(module, weight, size)
    return op


def _check_declared(module: nn.Module, op: LinearOperator) -> None:
    """Raise where a registered operator is visibly not the linear map of the layer's forward, if that can be run."""
    device = torch.device(op.device)
    x = probe(1, tuple(op.in_shape), op.dtype, device, seed=7)
    with undisturbed(module), torch.no_grad():
        try:
            image, double, offset = (module(v) for v in (x, -2 * x, 0 * x))
            steps = [image - offset, double - offset]
        except Exception:  # its input may be something else than one tensor
            if not _is_transposed(module, op):
                return
            raise ValueError(
                f"the operator registered for {type(module).__name__} takes inputs of shape {tuple(op.in_shape)}, and "
                f"its forward those of shape {tuple(op.out_shape)}: return the transpose, op.T"
            ) from None
        rounding = visible(op.dtype, device) * max(float(image.abs().max()), float(double.abs().max()))
        if float((steps[1] + 2 * steps[0]).abs().max()) > rounding:
            return  # not linear: the registered operator is a part of it
        wanted = apply(op, x)
        fits = wanted.shape == image.shape and float((wanted - steps[0]).abs().max()) <= rounding
    if not fits:
        raise ValueError(
            f"the operator registered for {type(module).__name__} is not the linear map of its forward: they differ on "
            f"a random input of shape {tuple(op.in_shape)}"
        )


def _is_transposed(module: nn.Module, op: LinearOperator) -> bool:
    """Whether the layer's forward takes what this operator returns, and returns what it takes."""
    try:
        image = module(torch.zeros(1, *op.out_shape, dtype=op.dtype, device=op.device))
    except Exception:
        return False
    return isinstance(image, Tensor) and tuple(image.shape[1:]) == tuple(op.in_shape)


def _measured(
    module: nn.Module, kind: LayerKind | None, weight: Tensor, size: int | Sequence[int] | None
) -> LinearOperator:
    """The operator of a layer with a forward of its own."""
    if kind is None:
        return traced_operator(module, (weight.shape[1],), weight.dtype, weight.device)
    if kind.table_size is not None:
        if weight.is_meta:
            raise NotLinear("its weight is on the meta device, without values to look up; load or initialise it first")
        return table_operator(module, kind.table_size(module), weight.device)
    if kind.axes and size is None:
        kind.operator(module, weight, None)  # raises
    if kind.input_shape is None:
        shape = tuple(kind.operator(module, weight, size).in_shape)
    else:
        shape = kind.input_shape(module, per_axis("input_size", size, kind.axes, 1) if size is not None else ())
    return traced_operator(module, shape, weight.dtype, weight.device)


def why_not_divisible(
    module: nn.Module, weight: Tensor, input_size: Sequence[int] | None, *, mapped: bool = False
) -> str | None:
    """Why dividing this parameter does not divide the layer's map in proportion; None if it does.

    Where the map is not simply that of the layer's kind, it is looked at with W, with 2 W and with a random weight: it
    has to be the operator of each. With ``mapped`` the weight of a registered operator may be a linear function of W.
    On meta the operator has to have the parameter itself for its weight; a registered one is taken on trust.
    """
    kind = kind_of(module)
    if kind is None:
        return None
    own = kind.why_not_exact(module)
    if own is None and (not kind.of_user or weight.is_meta):
        return None
    try:
        reason = _other_map(module, kind, weight.detach(), input_size, mapped, declared=own is None)
    except ValueError as error:
        return f"{own}: {error}" if own else str(error)
    label = own or f"the operator registered for {type(module).__name__}"
    return None if reason is None else f"{label}: {reason}; it can be measured"


def _other_map(
    module: nn.Module, kind: LayerKind, w: Tensor, size: Sequence[int] | None, mapped: bool, declared: bool
) -> str | None:
    """What keeps the map from being that of the layer's kind for parameter w; None if it is. Raises if not linear."""
    random = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w)
    trials = [w] if w.is_meta else [w, 2 * w, random, w + random]  # on meta the operations are followed, once
    maps = [(t, _with_weight(module, kind, t, size, not declared)) for t in trials]
    layers = [layer_operator(unscaled(op)[1]) for _, op in maps]
    if any(layer is None or len(layer.geometry.axes) != kind.axes for layer in layers):
        return "its map is not one convolution or matrix of the weight"
    if len(maps) > 1 and not _is_twice(maps[0][1], maps[1][1]):
        return "its map is not proportional to the weight, that of 2 W is not twice that of W"
    if mapped and declared:
        return None if _is_linear([op for _, op in maps]) else "its weight is not linear in the parameter"
    for t, op in maps:
        layer = layer_operator(op)
        same = [] if layer is None else [u for u in (layer.weight, layer.weight.T if not kind.axes else layer.weight)]
        if layer is None or not any(_is_same(u, t) for u in same):
            return "its map has another weight than the parameter itself"
        if not kind.of_user and not kind.table_size and layer.geometry != _declared(module, kind, t, size):
            return "its map is another convolution than that of its class"
    return None


def _is_same(weight: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal; on meta, whether they would be the same memory."""
    if weight.is_meta or other.is_meta:
        return is_same_memory(weight, other)
    return weight.shape == other.shape and torch.equal(weight, other)


def weight_of(op: LinearOperator) -> Tensor | None:
    """The weight of a layer's operator, or of a multiple of one; None of an operator without a weight."""
    factors, core = unscaled(op)
    layer = layer_operator(core)
    return None if layer is None else layer.weight * math.prod(factors) if factors else layer.weight


def _is_linear(ops: list[LinearOperator]) -> bool:
    """Whether the weights of the operators of W, 2 W, R and W + R add up, for one geometry."""
    weights = [weight_of(op) for op in ops]
    geometries = {getattr(unscaled(op)[1], "geometry", None) for op in ops}
    one, _, random, both = weights
    if one is None or random is None or both is None or len(geometries) > 1:
        return False
    if not one.shape == random.shape == both.shape:
        return False
    rounding = visible(both.dtype, both.device) * (one.abs().max() + random.abs().max())
    return bool((both - one - random).abs().max() <= rounding)


def _declared(module: nn.Module, kind: LayerKind, weight: Tensor, size: Sequence[int] | None) -> Geometry | None:
    layer = layer_operator(kind.operator(module, weight, size))
    return None if layer is None else layer.geometry


def _with_weight(
    module: nn.Module, kind: LayerKind, weight: Tensor, size: Sequence[int] | None, by_running: bool
) -> LinearOperator:
    """The layer's operator with another weight."""
    if not by_running:
        return kind.operator(module, weight, size)
    with undisturbed(module):
        own = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=own is not None and own.requires_grad)
        return _measured(module, kind, weight, size)


def _is_twice(one: LinearOperator, two: LinearOperator) -> bool:
    if tuple(one.in_shape) != tuple(two.in_shape) or tuple(one.out_shape) != tuple(two.out_shape):
        return False
    device = torch.device(one.device)
    x = probe(2, tuple(one.in_shape), torch.promote_types(one.dtype, torch.float32), device, seed=4)
    with torch.no_grad():
        image, double = apply(one, x), apply(two, x)
    return bool((double - 2 * image).abs().max() <= visible(one.dtype, device) * double.abs().max())


def is_of_weight(op: LinearOperator, declared: LinearOperator) -> bool:
    """Whether a map that was measured is the one that was declared: same geometry, same weight."""
    found, wanted = layer_operator(op), layer_operator(declared)
    if found is None or wanted is None or found.geometry != wanted.geometry:
        return False
    return _is_same(found.weight, wanted.weight)


def weight_in_use(module: nn.Module, name: str = "weight") -> Any:
    """The weight of the next forward: forward pre-hooks of torch.nn.utils that compute one are run first."""
    hooks = [h for h in module._forward_pre_hooks.values() if computes_weight(h)]
    if not hooks:
        return getattr(module, name, None)
    before = dict(vars(module))
    buffers = {key: b.clone() for key, b in module._buffers.items() if b is not None}
    try:
        for hook in hooks:
            hook(module, ())
        return getattr(module, name, None)
    finally:
        vars(module).clear()
        vars(module).update(before)
        with torch.no_grad():
            for key, value in buffers.items():
                held = module._buffers[key]
                if held is not None and not torch.equal(held, value):
                    held.copy_(value)


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


def checked_weight(module: nn.Module, name: str, *, parametrized: bool = False, on_meta: bool = False) -> Tensor:
    """The weight of this name; raises where there is none that has a norm.

    ``parametrized``: allow parametrizations other than spectral norms; the weight is what they make.
    ``on_meta``: allow a weight without memory, which is loaded or initialised later.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; give a torch.nn.Module")
    theirs = [type(p).__name__ for p in chain(module, name)] if parametrize.is_parametrized(module, name) else []
    if theirs and (not parametrized or any("SpectralNorm" in t for t in theirs)):
        ours = "sn_fast.remove_spectral_norm(module)"
        hint = " (replace=True replaces it)" * (parametrized and theirs[-1] == "_SpectralNorm")
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        raise ValueError(
            f"{parametrize.type_before_parametrizations(module).__name__}.{name} is already parametrized by "
            f"{', '.join(theirs)}{hint}; remove that first, with {ours if theirs == ['SpectralNorm'] else remedy}"
        )
    if theirs:
        weight = getattr(module, name)
        check_weight(weight, dims=range(2, 6))
        return weight
    weight = raw_weight(module, name)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(module).__name__}.{name} is a lazy parameter without a shape; run one forward first")
    if isinstance(weight, Tensor) and weight.is_meta and not on_meta:
        raise ValueError(f"{type(module).__name__}.{name} is on the meta device; load or initialise the weights first")
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; give a layer with a weight, or name=")
    check_weight(weight, dims=range(2, 6))
    return weight
