"""Histograms against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sn_fast.experiments.analysis.distributions import panel_of


def check_counts(values: torch.Tensor, scale: str = "linear") -> None:
    panel = panel_of("a", "b", {"all": values, "half": values[::2]}, scale)
    for d, array in zip(panel.distributions, (values.double().numpy(), values[::2].double().numpy())):
        edges = np.array(d.edges)
        assert list(d.counts) == np.histogram(array, edges)[0].tolist()
        assert (d.below, d.above) == ((array < edges[0]).sum(), (array > edges[-1]).sum())
        assert d.images == len(array)
        assert d.mean == pytest.approx(array.mean())
        assert list(d.quantiles[::8]) == [array.min(), array.max()]


def test_counts_of_values_on_the_edges_of_bins():
    check_counts(torch.arange(11).repeat(30).float())


@pytest.mark.parametrize("seed", range(4))
def test_counts_of_long_tails(seed):
    values = torch.distributions.StudentT(1.0).sample((3000,))
    check_counts(values)
    panel = panel_of("a", "b", {"all": values})
    assert panel.distributions[0].above > 0
    assert panel.distributions[0].edges[-1] < float(values.max())
    check_counts(values, "log")


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-30])
def test_equal_values_and_single_ones(value, scale):
    for n in (1, 7):
        (d,) = panel_of("a", "b", {"all": torch.full((n,), value)}, scale).distributions
        assert sum(d.counts) + d.below + d.above == n
        assert all(a < b for a, b in zip(d.edges, d.edges[1:]))
        assert d.below == (n if scale == "log" and value <= 0 else 0)


def test_bins_grow_with_the_number_of_images():
    counts = [len(panel_of("a", "b", {"all": torch.rand(n)}).distributions[0].counts) for n in (9, 400, 10_000)]
    assert counts == [10, 20, 50]
