"""The experiments of the paper: data sets, networks, and adversarial training with and without spectral normalisation.

Built on the public names of ``sn_fast`` alone.
"""

from .data import Split, load_data
from .networks import build_network, load_published, network_names

__all__ = ["Split", "build_network", "load_data", "load_published", "network_names"]
