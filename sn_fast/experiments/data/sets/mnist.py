"""MNIST."""

from __future__ import annotations

from ..idx import IdxSet
from ..registry import DataSet, register
from ..source_files import Origin

MNIST = IdxSet(
    Origin("mnist", "yann.lecun.com/exdb/mnist or its mirror ossci-datasets.s3.amazonaws.com/mnist"),
    folders=(".", "mnist", "MNIST/raw"),
    md5={
        "train-images": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels": "a25bea736e30d166cdddb491f175f624",
        "t10k-images": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels": "27ae3e4e09519cfbb04c329615203637",
    },
)

# The mean norm 9.2157 tells that the first 5,000 training images stay out: TensorFlow's reader set them aside.
register(DataSet("mnist", MNIST.read, official=True, reserved=5_000, published={}))
