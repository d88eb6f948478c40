"""Sums and products of positive numbers by their logarithms: those of deep networks neither vanish nor overflow."""

from __future__ import annotations

import math
from collections.abc import Iterable

_SLACK = 1e-13  # of a logarithm and of the sums that lead to it; each is right to a few 1e-16


def log(x: float) -> float:
    """The logarithm; -inf at 0."""
    return math.log(x) if x > 0 else -math.inf


def exp(x: float) -> float:
    """The exponential; inf where it exceeds float64."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def log_sum(logs: Iterable[float]) -> float:
    """log of a sum, from the logarithms of its terms."""
    values = list(logs)
    largest = max(values, default=-math.inf)
    if math.isinf(largest):
        return largest
    return largest + math.log(math.fsum(math.exp(v - largest) for v in values))


def log_one_plus(x: float) -> float:
    """log(1 + exp(x))."""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(exp(x))


def log_geometric(log_ratio: float, terms: int) -> float:
    """log(1 + q + ... + q^(terms - 1)) for q = exp(log_ratio), also at q = 1, where (1 - q^n) / (1 - q) is 0 / 0."""
    if log_ratio == 0 or terms == 1:
        return math.log(terms)
    if log_ratio > 0:  # largest term first
        return log_ratio * (terms - 1) + log_geometric(-log_ratio, terms)
    # (1 - q^n) / (1 - q), each difference without cancellation
    return math.log(-math.expm1(log_ratio * terms)) - math.log(-math.expm1(log_ratio))


def raised(x: float, *parts: float) -> float:
    """A logarithm with room for its rounding, and for that of the logarithms that were added up to it."""
    if math.isinf(x):
        return x
    return x + _SLACK * (1 + abs(x) + math.fsum(abs(p) for p in parts if math.isfinite(p)))
