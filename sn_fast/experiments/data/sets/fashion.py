"""Fashion-MNIST, which is not among the published experiments: the format and the sizes of MNIST."""

from __future__ import annotations

from ..idx import IdxSet
from ..registry import DataSet, register
from ..source_files import Origin
from .mnist import MNIST

FASHION = IdxSet(
    Origin("fashion", "github.com/zalandoresearch/fashion-mnist"),
    folders=(".", "fashion", "fashion-mnist", "FashionMNIST/raw"),
    gz_md5={
        "train-images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    others=(MNIST,),
)

register(DataSet("fashion", FASHION.read, official=True, reserved=5_000, published={}))
