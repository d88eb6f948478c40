"""The linear maps of layers."""

from .linear import ConvOperator, LinearOperator, MatrixOperator, operator_of

__all__ = ["ConvOperator", "LinearOperator", "MatrixOperator", "operator_of"]
