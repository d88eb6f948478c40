"""SVHN, cropped digits: two MATLAB files."""

from __future__ import annotations

import numpy as np

from ..mat import MatError, load_mat
from ..registry import DataSet, Images, Request, register
from ..source_files import Origin, check_sum, read_file, require_folder

ORIGIN = Origin("svhn", "ufldl.stanford.edu/housenumbers (format 2, cropped digits)")
FOLDERS = (".", "svhn", "SVHN")
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
LARGEST = 400_000_000
SHAPE = (32, 32, 3)


def read(request: Request) -> tuple[Images, Images]:
    """The training and the test images; the label 10 of the files is the digit 0."""
    require_folder(ORIGIN, request.root)
    train, test = (_part(request, name) for name in MD5)
    return train, test


def _part(request: Request, name: str) -> Images:
    path = next((p for p in (request.root / folder / name for folder in FOLDERS) if p.is_file()), None)
    if path is None:
        raise ORIGIN.missing(name, request.root, FOLDERS)
    content = read_file(ORIGIN, path, most=LARGEST)
    if not request.allow_partial:
        check_sum(ORIGIN, path, content, MD5[name], official=MD5)
    try:
        arrays = load_mat(content, most=LARGEST)
    except MatError as error:
        raise ORIGIN.damaged(path, f"cannot be read: {error}") from None
    if not arrays.keys() >= {"X", "y"}:
        raise ORIGIN.damaged(path, f"holds no images X and labels y, but {', '.join(arrays)[:100] or 'no arrays'}")
    pixels, labels = arrays["X"], arrays["y"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != SHAPE:
        raise ORIGIN.damaged(path, f"holds X of {pixels.dtype} and shape {pixels.shape}, not bytes of (32, 32, 3, N)")
    count = pixels.shape[3]
    if labels.size != count:
        raise ORIGIN.damaged(path, f"has {labels.size} labels of {count} images")
    if not np.isin(labels, np.arange(1, 11)).all():
        raise ORIGIN.damaged(path, "holds labels other than 1 to 10")
    return Images(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)), labels.reshape(-1).astype(np.int64) % 10)


register(DataSet("svhn", read, official=True, published={"whiten": True, "crop": 28}))
