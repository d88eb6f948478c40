"""The experiments of the paper: data sets, networks, and adversarial training with and without spectral normalisation.

Built on the public names of ``sn_fast`` alone.
"""

from .data import Split, load_data

__all__ = ["Split", "load_data"]
