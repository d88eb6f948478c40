"""The norms that the bounds are held against, float64 SVDs of whole matrices; and weights that are hard."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sn_fast import ConvOperator
from sn_fast.layers import LayerOperator

from ..layers.geometries import Case

CERTAIN = ("auto", "dense", "circulant", "fft", "rowsum")  # "lanczos" holds with a probability
SVD = 1e-13  # relative rounding of the truth itself


def dense_norm(op: LayerOperator) -> float:
    """|A| of a weight whose squares neither under- nor overflow."""
    exact = LayerOperator(op.weight.detach().double(), op.geometry)
    return float(torch.linalg.matrix_norm(exact.to_dense(), 2))


def hard_weight(weight: Tensor, seed: int) -> Tensor:
    """One of eight kinds with the shape of ``weight``: the peaks of their symbols lie at different frequencies."""
    kind = seed % 8
    if kind == 1:
        return weight.abs()  # peaks at frequency zero
    if kind == 2:
        return torch.ones_like(weight)
    if kind == 3:
        return weight.abs() * signs(weight, len(weight.shape) - 2)  # at the highest frequency
    if kind == 4:
        return signs(weight, 1 + seed // 8 % (weight.ndim - 2))  # at the highest frequency of some axes
    if kind == 5:
        return torch.where(weight.abs() == weight.abs().amax(), weight, 0.0)  # one tap
    if kind == 6:
        return weight * (weight.abs() > 1)  # sparse, perhaps zero
    return weight


def signs(weight: Tensor, axes: int) -> Tensor:
    """+1 and -1 in turns along the first spatial axes."""
    result = torch.ones_like(weight)
    for i in range(axes):
        shape = [-1 if d == 2 + i else 1 for d in range(weight.ndim)]
        result *= (1 - 2 * (torch.arange(weight.shape[2 + i]) % 2)).to(weight).reshape(shape)
    return result


def hard_operator(case: Case, dtype: torch.dtype) -> ConvOperator:
    weight = hard_weight(case.weight(), case.seed).to(dtype)
    return ConvOperator(weight, case.input_size, groups=case.groups, transposed=case.transposed, **case.options)


def scaled(value: float, exponent: int) -> float:
    """value * 2^exponent in two steps: through denormals and back."""
    return math.ldexp(math.ldexp(value, exponent // 2), exponent - exponent // 2)
