"""Whitening and crop against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sn_fast.errors import UserError
from sn_fast.experiments.data.images import to_input


def standardized(image: np.ndarray) -> np.ndarray:
    """TensorFlow's definition, of one image of 0 to 255: (x - mean) / max(stddev, 1 / sqrt(number of elements))."""
    x = image.astype(np.float64)
    return (x - x.mean()) / max(x.std(), 1 / np.sqrt(x.size))


def pixels(count: int, channels: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    scale = rng.uniform(1, 256, (count, 1, 1, 1))
    images = (rng.random((count, channels, height, width)) * scale).astype(np.uint8)
    images[0] = 77  # no deviation at all
    if count > 1:
        images[1] = 0
        images[1, 0, 0, 0] = 1  # a deviation that 1 / sqrt(n) just exceeds
    return images


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2100, 1, 9, 6), (1, 2, 1, 1)])
@pytest.mark.parametrize("unit", [False, True])
def test_whitening_is_tensorflows(shape, unit):
    images = pixels(*shape)
    given = (images / 255).astype(np.float32) if unit else images
    result = to_input(given, whiten=True, crop=None)
    expected = np.stack([standardized(image) for image in images])
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=2e-6)
    assert not result[0].any()


def test_whitened_images_have_mean_0_and_deviation_1():
    x = to_input(pixels(40, 3, 32, 32)[2:], whiten=True, crop=None).double()
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(38).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.square().mean((1, 2, 3)), torch.ones(38).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("side", "start"), [(28, 2), (27, 2), (32, 0), (1, 15)])
def test_the_crop_is_central_and_comes_after_whitening(whiten, side, start):
    images = pixels(3, 3, 32, 32)
    whole = to_input(images, whiten=whiten, crop=None)
    part = whole[:, :, start : start + side, start : start + side]
    assert torch.equal(to_input(images, whiten=whiten, crop=side), part)


def test_pixels_are_bytes_over_255_correctly_rounded():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = (images / 255).astype(np.float32)
    np.testing.assert_array_equal(to_input(images, whiten=False, crop=None).numpy(), expected)
    np.testing.assert_array_equal(to_input(expected, whiten=False, crop=None).numpy(), expected)


def test_a_crop_beyond_the_image_is_refused():
    with pytest.raises(UserError, match="crop=29: the images are 28x30 pixels"):
        to_input(np.zeros((2, 1, 28, 30), np.uint8), whiten=False, crop=29)
