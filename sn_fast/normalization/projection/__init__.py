"""Weights scaled back after each step of an optimizer, in place of a parametrization."""

from .spectral_projection import SpectralProjection

__all__ = ["SpectralProjection"]
