"""Normalised layers and models."""

from .clip import ClippedSpectrum, clip_spectrum
from .model import (
    apply_spectral_norm,
    frozen_sigma,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)

__all__ = [
    "ClippedSpectrum",
    "apply_spectral_norm",
    "clip_spectrum",
    "frozen_sigma",
    "remove_spectral_norm",
    "sigmas",
    "spectral_norm",
    "update_spectral_norm",
]
