"""The networks that the experiments train."""

from . import architectures  # noqa: F401 - registers them
from .build import build_network
from .demo import demo_network
from .layer_norms import layer_norms
from .registry import Architecture, architecture, architecture_of, network_names

__all__ = [
    "Architecture",
    "architecture",
    "architecture_of",
    "build_network",
    "demo_network",
    "layer_norms",
    "network_names",
]
