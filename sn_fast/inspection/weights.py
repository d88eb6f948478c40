"""Whether a model's weights have values that a norm can be taken of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError, failures_explained
from ..layers.linear import raw_weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_SHOWN = 3


def check_values(model: nn.Module) -> None:
    """Raise UserError if a parameter or a buffer is on the meta device, where it has a shape but no values."""
    with failures_explained("argument `model`: reading the model's parameters failed"):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        meta = [name for name, tensor in tensors if isinstance(tensor, Tensor) and tensor.is_meta]
    if meta:
        shown = ", ".join(meta[:_SHOWN]) + (", ..." if len(meta) > _SHOWN else "")
        raise UserError(
            f"argument `model`: {len(meta)} of the model's tensors {'is' if len(meta) == 1 else 'are'} on the meta "
            f"device and without values ({shown}): give them all with `checkpoint`, or make the model on the CPU"
        )


def check_weight(name: str, module: nn.Module) -> None:
    """Raise UserError unless the weight of layer ``name`` is a dense tensor of finite floating-point numbers."""
    weight = raw_weight(module)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return  # gets its values in the first forward
    if not isinstance(weight, Tensor) or weight.is_meta:
        raise UserError(f"layer {name}: its weight has no values yet; initialise or load the weights first")
    if weight.layout != torch.strided or weight.is_nested:
        kind = "nested" if weight.is_nested else str(weight.layout).removeprefix("torch._").removeprefix("torch.")
        raise UserError(f"layer {name}: its weight is a {kind} tensor; give a dense one, e.g. its to_dense()")
    if weight.is_quantized:
        raise UserError(f"layer {name}: its weight is quantised ({weight.dtype}); give its dequantize()")
    if weight.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UserError(
            f"layer {name}: its weight has dtype {weight.dtype}, and norms are found of {known}; convert it"
        )
    with failures_explained(f"layer {name}: reading its weight, a {type(weight).__name__}, failed"):
        finite = bool(torch.isfinite(weight).all())
    if not finite:
        raise UserError(f"layer {name}: its weight has NaN or infinite elements, and so no norm")


def quantized_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of layers whose weight is packed integers, which is no parameter."""
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith(_QUANTIZED) and callable(getattr(module, "weight", None))
    )
