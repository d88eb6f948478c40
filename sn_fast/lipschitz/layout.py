"""Constants of calls that move, copy, pad or pick elements, of casts, and of shape queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .origins import most_copies
from .rounding import root
from .rules import Call, Constant, leaves, no_bound, rule

_SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "itemsize", "names", "requires_grad", "layout")
_SAME_ELEMENTS = ("data", "values", "real")
_PERMUTED = ("T", "mT")


@rule("reshape", "view", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "permute", "transpose", "t")
@rule("adjoint", "swapaxes", "swapdims", "movedim", "moveaxis", "contiguous", "clone", "detach", "alias", "identity")
@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind", "narrow")
@rule("select", "flip", "fliplr", "flipud", "roll", "rot90", "diagonal", "tril", "triu", "masked_fill", "masked_select")
@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "hsplit", "vsplit", "dsplit")
@rule("expand", "repeat", "tile", "broadcast_to", "repeat_interleave", "unfold", "index_select", "take", "diag_embed")
@rule("take_along_dim", "gather", "getitem", "pad", "view_as", "reshape_as", "expand_as")
@rule(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold)
@rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
@rule(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
@rule(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
@rule(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def _picks(call: Call) -> Constant:
    # a matrix of ones and zeros with at most one 1 per row: sqrt(copies of the most copied element)
    if call.kind.endswith("_as"):
        call.ignores("other")
    if not isinstance(call.x, Tensor):
        call.ignores("index")
        return Constant(1.0)  # an element of a tuple
    if any(isinstance(a, torch.dtype) for a in leaves([call.args, call.kwargs])):
        return no_bound("the bits of one dtype read as another")
    return _numbered(call, call.again)


@rule("neg", "negative", "pos", "positive")
def _negative(call: Call) -> float:
    return 1.0


@rule("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad")
def _same_elements(call: Call) -> float:
    # a cast; the rounding of floating-point numbers is not counted
    call.ignores(*_others(call))
    return 1.0


@rule("size", "dim", "ndimension", "numel", "stride", "is_floating_point", "element_size", "get_device")
@rule("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "empty_like")
def _shape_only(call: Call) -> float | Constant:
    # the result does not depend on the elements
    others = _others(call)
    if "fill_value" in others:
        call.get("fill_value")
        others.remove("fill_value")
    call.ignores(*others)
    return 0.0


@rule("getattr")
def _getattr(call: Call) -> float | Constant:
    name = call.get("name")
    if name in _SHAPE_ATTRIBUTES:
        return 0.0
    if name in _PERMUTED:
        return _numbered(call, lambda numbers: getattr(numbers, name))
    return 1.0 if name in _SAME_ELEMENTS else no_bound(f"no rule for the attribute {name!r} of a tensor")


def _others(call: Call) -> list[str]:
    return [name for name in call.slots or {} if name != "input"]


def _numbered(call: Call, again: Any) -> Constant:
    """The constant of a call that picks elements: made on numbered ones, twice, to tell them from constants."""
    x = call.x
    n = max(x.numel(), 1)
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device).reshape(x.shape)
    first, second = again(numbers.clone()), again(numbers + n)
    pairs = list(zip(leaves(first), leaves(second)))
    if not pairs or not all(isinstance(a, Tensor) and _moves_by(a, b, n) for a, b in pairs):
        return no_bound(f"{call.kind}: its result is not made of elements of its input")
    picks = tuple(torch.where(b - a == n, a, 0.0).long() for a, b in pairs)
    return Constant(root(most_copies(picks)), picks=picks[0] if isinstance(call.out, Tensor) else picks)


def _moves_by(a: Tensor, b: Tensor, n: int) -> bool:
    moved = (b - a == n) & (a >= 1) & (a <= n)
    return a.shape == b.shape and bool((moved | (a == b) | (a.isnan() & b.isnan())).all())
