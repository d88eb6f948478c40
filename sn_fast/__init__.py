"""sn_fast: fast, true spectral norms of neural-network layers, and adversarial training with them."""

from ._version import __version__
from .info import info
from .operators import (
    ConvergenceWarning,
    ConvOperator,
    LinearOperator,
    MatrixOperator,
    operator_norm,
    operator_of,
)
from .spectral import (
    apply_spectral_norm,
    frozen_sigma,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)

__all__ = [
    "ConvOperator",
    "ConvergenceWarning",
    "LinearOperator",
    "MatrixOperator",
    "__version__",
    "apply_spectral_norm",
    "frozen_sigma",
    "info",
    "operator_norm",
    "operator_of",
    "remove_spectral_norm",
    "sigmas",
    "spectral_norm",
    "update_spectral_norm",
]
