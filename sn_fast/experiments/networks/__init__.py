"""The networks that the experiments train."""

from . import architectures  # noqa: F401 - registers them
from .build import build_network
from .demo import demo_network, layer_norms
from .registry import Architecture, architecture, network_names

__all__ = ["Architecture", "architecture", "build_network", "demo_network", "layer_norms", "network_names"]
