"""The official data themselves, where they are: SN_FAST_DATA, or shared/data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sn_fast.experiments import load_data

DATA = Path(os.environ.get("SN_FAST_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(scope="module")
def mnist():
    if not (DATA / "mnist").is_dir():
        pytest.skip(f"real MNIST not found: {DATA / 'mnist'} (set SN_FAST_DATA to the folder above it)")
    return load_data("mnist", DATA)


def test_mnist_is_split_as_published(mnist):
    assert [len(part) for part in (mnist.train, mnist.validation, mnist.test)] == [55_000, 500, 9_500]
    assert mnist.image_shape == (1, 28, 28)
    assert mnist.num_classes == 10
    assert round(mnist.mean_norm, 4) == 9.2157  # printed by the published code
    assert (mnist.validation.y[:4].tolist(), mnist.test.y[:4].tolist()) == ([7, 2, 1, 0], [3, 9, 5, 2])
