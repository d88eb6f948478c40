"""How a weight is normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from ..layers.linear import as_int
from ..ops.precision import PRECISIONS
from ..ops.precision import matmul_precision as matmul_precision

Mode = Literal["cap", "scale"]
OperatorName = Literal["conv", "reshape"]
Gradient = Literal["detached", "full"]
InputSize = int | Sequence[int] | Literal["any"] | None


def check_tol(tol: object) -> None:
    """Raise unless ``tol`` is None or a tolerance."""
    if tol is None:
        return
    if not isinstance(tol, Real) or isinstance(tol, bool) or not 0 < float(tol) < 1:
        raise ValueError(f"tol={tol!r} must be a number between 0 and 1, such as 1e-3, or None")


@dataclass(frozen=True)
class Options:
    """See ``sn_fast.spectral_norm``. Raises ValueError or TypeError for what is out of range."""

    beta: float = 1.0
    mode: str = "cap"
    n_power_iterations: int = 1
    operator: str = "conv"
    gradient: str = "detached"
    reduce: bool = True
    precision: str | None = None
    bound: bool = False
    tol: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("cap", "scale"):
            raise ValueError(f"mode={self.mode!r} is unknown; choose 'cap' (at most beta) or 'scale' (exactly beta)")
        if self.operator not in ("conv", "reshape"):
            raise ValueError(f"operator={self.operator!r} is unknown; choose 'conv' (the true operator) or 'reshape'")
        if self.gradient not in ("detached", "full"):
            raise ValueError(f"gradient={self.gradient!r} is unknown; choose 'detached' or 'full'")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; choose None or one of {', '.join(PRECISIONS)}")
        if not isinstance(self.beta, Real) or isinstance(self.beta, bool):
            raise TypeError(f"beta={self.beta!r} must be a number > 0")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta!r} must be > 0 (inf switches the normalisation off)")
        if self.mode == "scale" and self.beta == math.inf:
            raise ValueError("beta=inf must be finite with mode='scale'")
        if self.bound and self.full:
            raise ValueError("bound=True has no gradient='full': the certificate is not differentiated; use 'detached'")
        check_tol(self.tol)
        object.__setattr__(self, "beta", float(self.beta))
        n = as_int("n_power_iterations", self.n_power_iterations, minimum=1)
        object.__setattr__(self, "n_power_iterations", n)

    @property
    def cap(self) -> bool:
        return self.mode == "cap"

    @property
    def full(self) -> bool:
        return self.gradient == "full"

    @property
    def product_precision(self) -> str:
        """How kernels form products, as the operators take it."""
        return self.precision or "auto"
