"""Constants of calls that move, copy, pad or pick elements, and of shape queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .rounding import root
from .rules import Call, Constant, Depends, leaves, no_bound, rule

_SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "itemsize", "names", "requires_grad")
_SAME_ELEMENTS = ("T", "mT", "data", "values", "real")


@rule(
    "reshape", "view", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "permute", "transpose", "t", "adjoint"
)
@rule("swapaxes", "swapdims", "movedim", "moveaxis", "contiguous", "clone", "detach", "requires_grad", "alias")
@rule(
    "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind", "narrow", "select"
)
@rule("flip", "fliplr", "flipud", "roll", "rot90", "diagonal", "tril", "triu", "atleast_1d", "atleast_2d", "atleast_3d")
@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "neg", "negative", "pos")
@rule("float", "double", "half", "bfloat16", "cpu", "cuda", "identity", "masked_fill")
@rule(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
@rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _each_element_once(call: Call) -> float | Constant:
    # every element of the result is one of the input (up to sign), and no two are the same one; or a constant
    if call.kind == "view" and any(isinstance(a, torch.dtype) for a in leaves([call.args, call.kwargs])):
        return no_bound("the bits of one dtype read as another")
    return 1.0


@rule("view_as", "reshape_as", "to", "type", "type_as", depends=Depends.SHAPES)
def _same_elements(call: Call) -> float:
    return 1.0


@rule("expand", "repeat", "tile", "broadcast_to", "repeat_interleave", "unfold", nn.Unfold, "index_select", "take")
@rule("take_along_dim", "gather", "getitem", nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
@rule(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
@rule(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def _copies(call: Call) -> float:
    # the columns of a matrix of ones and zeros with one 1 per row: sqrt(copies of the most copied element)
    if not isinstance(call.x, Tensor) or (call.kind == "getitem" and not _picks_by_tensor(call.args[1])):
        return 1.0  # an element of a tuple, or a slice
    return root(_largest_multiplicity(call))


@rule("expand_as", depends=Depends.SHAPES)
def _expand_as(call: Call) -> float:
    return call.repeated(call.x)


@rule("pad")
def _pad(call: Call) -> float | Constant:
    return 1.0 if call.get("mode", 2, "constant") == "constant" else _copies(call)


@rule("size", "dim", "ndimension", "numel", "stride", "is_floating_point", "new_zeros", "new_ones", "new_full")
@rule("zeros_like", "ones_like", "full_like", "element_size", "get_device")
@rule("new_tensor", depends=Depends.SHAPES)
def _shape_only(call: Call) -> float:
    # the result does not depend on the elements
    return 0.0


@rule("getattr")
def _getattr(call: Call) -> float | Constant:
    name = call.args[1]
    if name in _SHAPE_ATTRIBUTES:
        return 0.0
    return 1.0 if name in _SAME_ELEMENTS else no_bound(f"no rule for the attribute {name!r} of a tensor")


def _picks_by_tensor(index: Any) -> bool:
    picks = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, (Tensor, list)) for p in picks)


def _largest_multiplicity(call: Call) -> int:
    """How often the most copied element of the first argument occurs in the result: the call made on numbered ones."""
    numbers = torch.arange(1, call.x.numel() + 1, dtype=torch.float64, device=call.x.device).reshape(call.x.shape)
    args, kwargs = call.args, call.kwargs
    if args:
        args = (numbers, *args[1:])
    else:
        kwargs = {**kwargs, next(iter(kwargs)): numbers}
    if call.module is not None:
        picked = call.module.forward(*args, **kwargs)
    elif isinstance(call.target, str):
        picked = getattr(args[0], call.target)(*args[1:], **kwargs)
    else:
        picked = call.target(*args, **kwargs)
    counts = torch.bincount(torch.cat([p.flatten() for p in leaves(picked)]).long(), minlength=2)
    return int(counts[1:].max())  # 0 is padding
