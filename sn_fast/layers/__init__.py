"""The linear maps of layers."""

from .linear import ConvOperator, LayerOperator, MatrixOperator, operator_of
from .operators import LinearOperator

__all__ = ["ConvOperator", "LayerOperator", "LinearOperator", "MatrixOperator", "operator_of"]
