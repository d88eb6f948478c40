"""Normalised layers and models."""

from .model import (
    apply_spectral_norm,
    frozen_sigma,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)
from .projection import SpectralProjection
from .summary import spectral_norm_summary

__all__ = [
    "SpectralProjection",
    "apply_spectral_norm",
    "frozen_sigma",
    "remove_spectral_norm",
    "sigmas",
    "spectral_norm",
    "spectral_norm_summary",
    "update_spectral_norm",
]
