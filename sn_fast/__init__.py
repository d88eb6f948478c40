"""sn_fast: fast, true spectral norms of neural-network layers, and adversarial training with them."""

import importlib
from typing import TYPE_CHECKING

from . import _interrupts  # noqa: F401 - first, so that Ctrl-C during the imports of sn-fast is one line
from ._version import __version__
from .info import info
from .layers import ConvOperator, LinearOperator, MatrixOperator, operator_of, register_layer
from .lipschitz import LipschitzReport, lipschitz_bound
from .normalization import (
    SpectralProjection,
    apply_spectral_norm,
    frozen_sigma,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    spectral_norm_summary,
    update_spectral_norm,
)
from .norms import (
    BoundInfo,
    ClippedSpectrum,
    ConvergenceWarning,
    clip_spectrum,
    operator_norm,
    operator_norm_bound,
    operator_norm_interval,
    singular_values,
)

if TYPE_CHECKING:
    from . import attacks, theory

_ROOMS = ("attacks", "experiments", "theory")  # packages of their own public names, imported at their first use

__all__ = [
    "BoundInfo",
    "ClippedSpectrum",
    "ConvOperator",
    "ConvergenceWarning",
    "LinearOperator",
    "LipschitzReport",
    "MatrixOperator",
    "SpectralProjection",
    "__version__",
    "apply_spectral_norm",
    "attacks",
    "clip_spectrum",
    "frozen_sigma",
    "info",
    "lipschitz_bound",
    "operator_norm",
    "operator_norm_bound",
    "operator_norm_interval",
    "operator_of",
    "register_layer",
    "remove_spectral_norm",
    "sigmas",
    "singular_values",
    "spectral_norm",
    "spectral_norm_summary",
    "theory",
    "update_spectral_norm",
]


if not TYPE_CHECKING:  # a checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
