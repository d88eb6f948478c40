"""The linear maps of layers, and their norms measured from below."""

from .linear import ConvOperator, LinearOperator, MatrixOperator, operator_of
from .norm import ConvergenceWarning, operator_norm
from .singular_values import singular_values

__all__ = [
    "ConvOperator",
    "ConvergenceWarning",
    "LinearOperator",
    "MatrixOperator",
    "operator_norm",
    "operator_of",
    "singular_values",
]
