"""Norms of linear maps: estimates from below, bounds from above with proof, singular values, and clipping them."""

from .bound import operator_norm_bound
from .clip import ClippedSpectrum, clip_spectrum
from .estimate import ConvergenceWarning, operator_norm
from .general_bound import BoundInfo
from .interval import operator_norm_interval
from .singular_values import singular_values

__all__ = [
    "BoundInfo",
    "ClippedSpectrum",
    "ConvergenceWarning",
    "clip_spectrum",
    "operator_norm",
    "operator_norm_bound",
    "operator_norm_interval",
    "singular_values",
]
