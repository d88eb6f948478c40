"""Constants of linear layers, of their functions, and of products with constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_base

from ..layers.kinds import classes_of, kind_of, spatial_axes
from ..layers.linear import operator_of, weight_in_use
from ..layers.operators import LinearOperator
from ..layers.weighted import ConvOperator, LayerOperator, MatrixOperator, layer_operator
from ..norms import operator_norm_bound
from .rounding import loosened, next_up, root, times
from .rules import Call, Constant, Depends, no_bound, rule

_BATCH_STATISTICS = "without running statistics it divides by the deviation of its own input: no useful bound"


@rule("linear", nn.Linear)
@rule("conv1d", "conv2d", "conv3d", *classes_of("conv"))
@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", *classes_of("transposed conv"))
def linear_layer(call: Call) -> Constant:
    # the norm of the layer's linear map for this input size, certified
    return _certificate(call, None, None)


@rule("batch_norm", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def batch_norm(call: Call) -> float | Constant:
    # diagonal: gamma / sqrt(variance + eps) per channel
    scale = _scale(call)
    return no_bound(_BATCH_STATISTICS) if scale is None else loosened(float(scale.abs().max()))


def folded(layer: Call, norm: Call) -> Constant | None:
    """The constant of a linear layer and the batch normalisation after it, taken as one linear map.

    None if they are not one: the normalisation has no running statistics, or its channels are not the layer's outputs.
    """
    scale = _scale(norm)
    operator = _operator(layer)
    channels_are_outputs = layer.out.ndim == len(operator.out_shape) + 1
    if scale is None or not channels_are_outputs or scale.numel() != operator.out_shape[0]:
        return None
    constant = _certificate(layer, scale, norm.module)
    return Constant(loosened(constant.value), constant.how, constant.reason)


def _certificate(call: Call, scale: Tensor | None, norm: nn.Module | None) -> Constant:
    """The bound of a linear layer whose outputs are scaled; one layer at one size is bounded once."""
    operator = _operator(call)
    if not isinstance(operator, LayerOperator):
        constant = _bounded(call, operator)
        factor = 1.0 if scale is None else loosened(float(scale.abs().max()))
        return Constant(times(constant.value, factor), constant.how, constant.reason)
    holder = call.module if call.module is not None else call.get("weight", 1)
    key = (id(holder), operator.geometry, id(norm))
    reusable = scale is None or norm is not None
    if not (reusable and key in call.cache):
        operator = operator if scale is None else _scaled(operator, scale)
        # What the ids stand for is kept, so that they stay theirs.
        call.cache[key] = (_bounded(call, operator), holder, norm)
    found: Constant = call.cache[key][0]
    return found


def _bounded(call: Call, operator: LinearOperator) -> Constant:
    if isinstance(operator, LayerOperator) and not bool(torch.isfinite(operator.weight).all()):
        raise ValueError(f"layer {call.name!r} ({call.kind}): its weight has NaN or infinite elements")
    bound, info = operator_norm_bound(operator, return_info=True)
    if not info.certified or info.confidence < 1:
        return no_bound("its linear map is known by its products alone, which certify nothing")
    return Constant(float(bound), info.method)


def _operator(call: Call) -> LinearOperator:
    if call.module is not None:
        axes = spatial_axes(call.module)
        size = tuple(call.x.shape[call.x.ndim - axes :]) if axes else None
        kind = kind_of(call.module)
        everywhere = module_base._global_forward_hooks or module_base._global_forward_pre_hooks
        if kind is not None and not everywhere and kind.why_not_exact(call.module, hooks=False) is None:
            operator = kind.operator(
                call.module, weight_in_use(call.module), size
            )  # its hooks are watched in the graph
        else:
            operator = operator_of(call.module, size)
        layer = layer_operator(operator)
        return operator if layer is None else LayerOperator(layer.weight.detach(), layer.geometry)
    weight = call.get("weight", 1).detach()
    if call.kind == "linear":
        return MatrixOperator(weight if weight.ndim == 2 else weight[None])
    transposed = "transpose" in call.kind
    order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    settings = {
        name: call.get(name, 3 + i, 0 if "padding" in name else 1)
        for i, name in enumerate(("stride", "padding", *order))
    }
    return ConvOperator(weight, tuple(call.x.shape[2 - weight.ndim :]), transposed=transposed, **settings)


def _scaled(operator: LayerOperator, scale: Tensor) -> LayerOperator:
    """The operator followed by one factor per output channel."""
    weight, geometry = operator.weight.double(), operator.geometry
    if geometry.transposed:  # (groups * inputs, outputs, ...): outputs are numbered within their group
        grouped = weight.reshape(geometry.groups, -1, *weight.shape[1:])
        factors = scale.reshape(geometry.groups, 1, -1, *(1,) * len(geometry.axes))
        return LayerOperator((grouped * factors).reshape(weight.shape), geometry)
    return LayerOperator(weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), geometry)


def _scale(call: Call) -> Tensor | None:
    """gamma / sqrt(variance + eps) of an evaluated normalisation; None where it uses the statistics of its input."""
    if call.target is torch.batch_norm:  # its arguments are in another order than those of F.batch_norm
        return None
    variance = call.get("running_var", 2)
    if variance is None or call.get("training", 5, False):
        return None
    weight = call.get("weight", 3, None)
    gamma = torch.ones_like(variance) if weight is None else weight
    scale: Tensor = gamma.detach().double() / (variance.double() + call.get("eps", 7, 1e-5)).sqrt()
    return scale


@rule("mul", "imul", "multiply", depends=Depends.ONE)
def _mul(call: Call) -> float:
    # diagonal, times the copies that broadcasting makes
    x, factor = _operands(call)
    return times(_largest(factor), call.repeated(x))


@rule("div", "truediv", "itruediv", "divide", "true_divide")
def _div(call: Call) -> float | Constant:
    if call.get("rounding_mode", 2, None) is not None:
        return no_bound("division with rounding jumps")
    smallest = _smallest(call.get("other", 1))
    if smallest == 0:
        return no_bound("division by zero")
    return times(next_up(1 / smallest), call.repeated(call.x))


@rule("matmul", "imatmul", "mm", "bmm", "mv", "dot", depends=Depends.ONE)
def _matmul(call: Call) -> Constant:
    return _product(call, *_operands(call))


@rule("addmm", "baddbmm", "addmv", depends=Depends.ONE)
def _addmm(call: Call) -> float | Constant:
    # beta * input + alpha * a @ b
    if call.x_bound:
        return times(abs(float(call.get("beta", 3, 1))), call.repeated(call.x))
    a, b = (v for v in [*call.args, *call.kwargs.values()][1:] if isinstance(v, Tensor))
    a_bound, _ = ([*call.bounds, *call.keyword_bounds.values()])[1:3]
    product = _product(call, *((a, b) if a_bound else (b, a)))
    return Constant(times(product.value, abs(float(call.get("alpha", 4, 1)))), product.how)


def _product(call: Call, x: Tensor, matrix: Tensor) -> Constant:
    """The constant of x @ matrix, or of matrix @ x."""
    batch = math.prod(torch.broadcast_shapes(x.shape[:-2], matrix.shape[:-2]))
    copies = root(batch / max(math.prod(x.shape[:-2]), 1))
    if matrix.ndim > 2:  # the largest of the stack
        norms = torch.linalg.matrix_norm(matrix.detach().double(), 2)
        return Constant(times(loosened(float(norms.max())), copies), "dense")
    constant = _bounded(call, MatrixOperator(matrix.detach().reshape(1, -1) if matrix.ndim == 1 else matrix.detach()))
    return Constant(times(constant.value, copies), constant.how)


def _operands(call: Call) -> tuple[Any, Any]:
    """The factor that depends on the input, and the other."""
    a, b = [*call.args, *call.kwargs.values()][:2]
    return (a, b) if call.x_bound else (b, a)


def _largest(factor: Any) -> float:
    if isinstance(factor, Tensor):
        return float(factor.detach().double().abs().max()) if factor.numel() else 0.0
    return abs(float(factor))


def _smallest(divisor: Any) -> float:
    return float(divisor.detach().abs().min()) if isinstance(divisor, Tensor) else abs(float(divisor))
