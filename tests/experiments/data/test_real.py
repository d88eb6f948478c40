"""The official data themselves, where they are: SN_FAST_DATA, or shared/data beside the repository."""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sn_fast.errors import UserError
from sn_fast.experiments import load_data
from sn_fast.experiments.data import published_options

DATA = Path(os.environ.get("SN_FAST_DATA", Path(__file__).parents[4] / "shared" / "data"))
SUBSET = DATA / "cifar-10-subset.tar.gz"


@pytest.fixture(scope="module")
def mnist():
    if not (DATA / "mnist").is_dir():
        pytest.skip(f"real MNIST not found: {DATA / 'mnist'} (set SN_FAST_DATA to the folder above it)")
    return load_data("mnist", DATA)


@pytest.fixture
def subset() -> Path:
    """One training batch of 10,000 real images and 3,000 of the test batch, in the official format."""
    if not SUBSET.is_file():
        pytest.skip(f"subset of CIFAR-10 not found: {SUBSET} (set SN_FAST_DATA to its folder)")
    return SUBSET


def test_mnist_is_split_as_published(mnist):
    assert [len(part) for part in (mnist.train, mnist.validation, mnist.test)] == [55_000, 500, 9_500]
    assert mnist.image_shape == (1, 28, 28)
    assert mnist.num_classes == 10
    assert (mnist.train.x.min(), mnist.train.x.max()) == (0, 1)
    assert round(mnist.mean_norm, 4) == 9.2157  # printed by the published code
    assert (mnist.validation.y[:4].tolist(), mnist.test.y[:4].tolist()) == ([7, 2, 1, 0], [3, 9, 5, 2])


def test_the_published_norm_is_of_no_other_part_of_mnist(mnist):
    every = load_data("mnist", DATA, split="all")
    assert len(every.train) == 60_000
    assert round(every.mean_norm, 4) != 9.2157
    assert torch.equal(every.train.x[5_000:], mnist.train.x)


def test_mnist_as_torchvision_reads_it(mnist, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (DATA / "mnist").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    split = load_data("mnist", tmp_path, split="held_out")
    train, test = (datasets.MNIST(str(tmp_path), train=part) for part in (True, False))
    for dataset, parts in ((train, (split.validation, split.train)), (test, (split.test,))):
        assert torch.equal(torch.cat([part.x for part in parts])[:, 0], dataset.data.float() / 255)
        assert torch.equal(torch.cat([part.y for part in parts]), dataset.targets)


def test_a_cut_mnist_is_refused(mnist, tmp_path):
    for path in (DATA / "mnist").glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is cut or damaged \(gzip\); get it again"):
        load_data("mnist", tmp_path)


def test_a_subset_of_cifar10_is_taken_when_allowed(subset):
    with pytest.raises(UserError, match=r"lacks data_batch_2, .*, data_batch_5; .*allow_partial"):
        load_data("cifar10", subset.parent)
    split = load_data("cifar10", subset.parent, allow_partial=True)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [10_000, 500, 2_500]
    with tarfile.open(subset) as archive:
        file = archive.extractfile("cifar-10-batches-py/data_batch_1")
        assert file is not None
        batch = pickle.loads(file.read(), encoding="bytes")
    np.testing.assert_array_equal(split.train.y, batch[b"labels"])
    np.testing.assert_array_equal((split.train.x * 255).round().reshape(-1, 3072), batch[b"data"])


def test_cifars_published_norm(subset):
    """0.05 E||x|| of whitened, cropped CIFAR-10 is about 2.44."""
    split = load_data("cifar10", subset, allow_partial=True, **published_options("cifar10"))
    assert split.image_shape == (3, 28, 28)
    assert round(0.05 * split.mean_norm, 2) == 2.44
