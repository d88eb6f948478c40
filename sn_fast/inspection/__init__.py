"""Norms of every layer of a model: what ``sn-fast norms`` does, without the command line.

>>> loaded = load_model("torchvision:resnet50")
>>> print(table(inspect_model(loaded.module, (3, 224, 224))))
"""

from .checkpoint import load_checkpoint
from .layers import Inspection, LayerMeasurement, inspect_model
from .load import LoadedModel, load_model
from .plot import plot
from .table import table

__all__ = [
    "Inspection",
    "LayerMeasurement",
    "LoadedModel",
    "inspect_model",
    "load_checkpoint",
    "load_model",
    "plot",
    "table",
]
