"""From pixels to the network's input: per-image whitening and the centre crop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import OptionError

_CHUNK = 1024
_WHITE = 255


def to_input(pixels: np.ndarray, *, whiten: bool, crop: int | None) -> Tensor:
    """Pixels (N, C, H, W), uint8, or float32 in [0, 1], as float32 in [0, 1], or whitened; then cropped.

    Raises:
        UserError: the crop is larger than the images.
    """
    count, channels, height, width = pixels.shape
    side = (height, width) if crop is None else (crop, crop)
    if not (0 < side[0] <= height and 0 < side[1] <= width):
        raise OptionError("crop", crop, f"the images are {height}x{width} pixels; give a smaller one")
    top, left = (height - side[0]) // 2, (width - side[1]) // 2
    result = torch.empty(count, channels, *side)
    for start in range(0, count, _CHUNK):
        part = torch.from_numpy(pixels[start : start + _CHUNK])
        x = whitened(part) if whiten else _in_unit_range(part)
        result[start : start + _CHUNK] = x[:, :, top : top + side[0], left : left + side[1]]
    return result


def _in_unit_range(pixels: Tensor) -> Tensor:
    return pixels.float() / _WHITE if pixels.dtype == torch.uint8 else pixels


def whitened(pixels: Tensor) -> Tensor:
    """(x - mean) / max(std, 1 / sqrt(n)) over each image's n values, as TensorFlow's ``per_image_standardization``.

    The floor of the standard deviation counts in pixels of 0 to 255, as the published data are.
    """
    x = pixels.double() if pixels.dtype == torch.uint8 else pixels.double() * _WHITE
    axes = (1, 2, 3)
    x = x - x.mean(axes, keepdim=True)
    deviation = x.square().mean(axes, keepdim=True).sqrt()
    return (x / deviation.clamp_min(x[0].numel() ** -0.5)).float()
