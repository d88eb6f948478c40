"""Bounds of whole networks: each module's constant, and how they compose."""

from .propagate import lipschitz_bound
from .report import LayerBound, LipschitzReport

__all__ = ["LayerBound", "LipschitzReport", "lipschitz_bound"]
