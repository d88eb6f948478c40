"""True spectral norms: operators, their norms, and normalised layers and models."""

from .model import (
    apply_spectral_norm,
    frozen_sigma,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)
from .norm import ConvergenceWarning, operator_norm
from .operators import ConvOperator, LinearOperator, MatrixOperator, operator_of

__all__ = [
    "ConvOperator",
    "ConvergenceWarning",
    "LinearOperator",
    "MatrixOperator",
    "apply_spectral_norm",
    "frozen_sigma",
    "operator_norm",
    "operator_of",
    "remove_spectral_norm",
    "sigmas",
    "spectral_norm",
    "update_spectral_norm",
]
