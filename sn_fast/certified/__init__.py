"""Bounds of operators' norms from above, with proof."""

from .bound import BoundInfo, operator_norm_bound
from .interval import operator_norm_interval

__all__ = ["BoundInfo", "operator_norm_bound", "operator_norm_interval"]
