"""Data sets: images and labels by name, split into samples for training, validation and test."""

from .load import load_data
from .registry import data_set_names, published_options
from .samples import Samples, Split, load_split

__all__ = ["Samples", "Split", "data_set_names", "load_data", "load_split", "published_options"]
