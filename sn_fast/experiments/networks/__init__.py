"""The networks that the experiments train."""

from .demo import demo_network, layer_norms

__all__ = ["demo_network", "layer_norms"]
