"""The networks that the experiments train."""

from . import architectures  # noqa: F401 - registers them
from .build import build_network, normalized_layers
from .demo import demo_network
from .layer_norms import layer_norms
from .modes import evaluating
from .published import load_published, published_names
from .registry import Architecture, architecture, network_names
from .regularization import parameter_groups
from .stack import Stack

__all__ = [
    "Architecture",
    "Stack",
    "architecture",
    "build_network",
    "demo_network",
    "evaluating",
    "layer_norms",
    "load_published",
    "network_names",
    "normalized_layers",
    "parameter_groups",
    "published_names",
]
