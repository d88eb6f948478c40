"""Constants of linear layers, of their functions, and of products with constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.exact import BATCH_STATISTICS, why_not_its_class
from ..layers.kinds import classes_of, kind_of, spatial_axes
from ..layers.linear import operator_of, weight_in_use
from ..layers.operators import LinearOperator
from ..layers.weighted import ConvOperator, LayerOperator, MatrixOperator, layer_operator
from ..norms import operator_norm_bound
from .rounding import loosened, mul_up
from .rules import BadWeights, Call, Constant, Depends, no_bound, rule
from .sums import inverse, magnitude


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
    scale = normalisation_scale(call)
    return no_bound(f"{BATCH_STATISTICS}: no useful bound") if scale is None else loosened(float(scale.abs().max()))


def folded(layer: Call, norm: Call) -> Constant | None:
    """The constant of a linear layer and the batch normalisation after it, taken as one linear map.

    None if they are not one: the normalisation has no running statistics, or its channels are not the layer's outputs.
    """
    scale = normalisation_scale(norm)
    operator = linear_map(layer)
    channels_are_outputs = layer.out.ndim == len(operator.out_shape) + 1
    if scale is None or not channels_are_outputs or scale.numel() != operator.out_shape[0]:
        return None
    constant = _certificate(layer, scale, norm.module)
    return Constant(loosened(constant.value), constant.how, constant.reason)


def _certificate(call: Call, scale: Tensor | None, norm: nn.Module | None) -> Constant:
    """The bound of a linear layer whose outputs are scaled; one layer at one size is bounded once."""
    operator = linear_map(call)
    if not isinstance(operator, LayerOperator):
        constant = bounded(call, operator)
        factor = 1.0 if scale is None else loosened(float(scale.abs().max()))
        return Constant(mul_up(constant.value, factor), constant.how, constant.reason)
    holder = call.module if call.module is not None else call.get("weight")
    tensors = [*holder.parameters(), *holder.buffers()] if isinstance(holder, nn.Module) else [holder]
    key = (id(holder), tuple(t._version for t in tensors), operator.geometry, id(norm))
    reusable = scale is None or norm is not None
    if not (reusable and key in call.cache):
        operator = operator if scale is None else scaled_outputs(operator, scale)
        # What the ids stand for is kept, so that they stay theirs.
        call.cache[key] = (bounded(call, operator), holder, norm)
    constant = call.cache[key][0]
    outputs = tuple(call.out.shape[-len(operator.out_shape) :])
    if operator.geometry.axes and outputs != operator.out_shape:
        return no_bound(f"{call.kind} with an output of size {outputs[1:]}: no rule")
    return constant


def bounded(call: Call, operator: LinearOperator) -> Constant:
    """The certified norm of a linear map."""
    if isinstance(operator, LayerOperator) and not bool(torch.isfinite(operator.weight).all()):
        raise BadWeights(f"layer {call.name!r} ({call.kind}): its weight has NaN or infinite elements")
    bound, info = operator_norm_bound(operator, return_info=True)
    if not info.certified or info.confidence < 1:
        return no_bound("its linear map is known by its products alone, which certify nothing")
    return Constant(float(bound), info.method)


def linear_map(call: Call) -> LinearOperator:
    """The operator of a linear layer or of its function, at the size of its input."""
    call.allows("bias", "output_size")
    if call.module is not None:
        axes = spatial_axes(call.module)
        size = tuple(call.x.shape[call.x.ndim - axes :]) if axes else None
        kind = kind_of(call.module)
        if kind is not None and kind.why_not_exact(call.module, hooks=False) is None:  # hooks are seen in the graph
            operator = kind.operator(call.module, weight_in_use(call.module), size)
        else:
            operator = operator_of(call.module, size)
        layer = layer_operator(operator)
        return operator if layer is None else LayerOperator(layer.weight.detach(), layer.geometry)
    weight = call.get("weight").detach()
    if call.kind == "linear":
        return MatrixOperator(weight if weight.ndim == 2 else weight[None])
    transposed = "transpose" in call.kind
    order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    settings = {name: call.get(name, 0 if "padding" in name else 1) for name in ("stride", "padding", *order)}
    return ConvOperator(weight, tuple(call.x.shape[2 - weight.ndim :]), transposed=transposed, **settings)


def scaled_outputs(operator: LayerOperator, scale: Tensor) -> LayerOperator:
    """The operator followed by one factor per output channel."""
    weight, geometry = operator.weight.double(), operator.geometry
    if geometry.transposed:  # (groups * inputs, outputs, ...): outputs are numbered within their group
        grouped = weight.reshape(geometry.groups, -1, *weight.shape[1:])
        factors = scale.reshape(geometry.groups, 1, -1, *(1,) * len(geometry.axes))
        return LayerOperator((grouped * factors).reshape(weight.shape), geometry)
    return LayerOperator(weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), geometry)


def normalisation_scale(call: Call) -> Tensor | None:
    """gamma / sqrt(variance + eps) of an evaluated normalisation; None where it uses the statistics of its input."""
    call.allows("running_mean", "bias", "momentum", "cudnn_enabled")
    if call.module is not None and why_not_its_class(call.module, hooks=False) is not None:
        return None
    variance = call.get("running_var")
    if variance is None or call.get("training", False):
        return None
    weight = call.get("weight", None)
    gamma = torch.ones_like(variance) if weight is None else weight
    scale: Tensor = gamma.detach().double() / (variance.double() + call.get("eps", 1e-5)).sqrt()
    return scale


@rule("mul", "imul", "multiply", depends=Depends.ONE)
def _mul(call: Call) -> float:
    # diagonal, times the copies that broadcasting makes
    x, factor = call.factors("input", "other")
    return mul_up(magnitude(call.get(factor)), call.repeated(call.get(x)))


@rule("div", "truediv", "itruediv", "divide", "true_divide")
def _div(call: Call) -> float | Constant:
    if call.get("rounding_mode", None) is not None:
        return no_bound("division with rounding jumps")
    return mul_up(inverse(call.get("other")), call.repeated(call.x))
