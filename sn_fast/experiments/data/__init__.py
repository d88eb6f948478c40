"""Data sets: images and labels, and their split into training and test samples."""

from .samples import Samples, Split, load_split

__all__ = ["Samples", "Split", "load_split"]
