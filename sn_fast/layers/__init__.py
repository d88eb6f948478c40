"""The linear maps of layers."""

from .kinds import register_layer
from .linear import operator_of
from .operators import LinearOperator
from .weighted import ConvOperator, LayerOperator, MatrixOperator

__all__ = ["ConvOperator", "LayerOperator", "LinearOperator", "MatrixOperator", "operator_of", "register_layer"]
