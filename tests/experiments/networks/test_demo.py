from __future__ import annotations

import math

import pytest
import torch

from sn_fast import operator_of
from sn_fast.experiments.networks import demo_network, layer_norms

SHAPES = {"digits": torch.Size((1, 8, 8)), "mnist5k": torch.Size((1, 28, 28))}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_for_every_image(shape):
    assert demo_network(shape, math.inf, seed=0)(torch.zeros(3, *shape)).shape == (3, 10)


def test_equal_seeds_start_from_equal_weights_whatever_beta():
    plain, capped, other = (demo_network(SHAPES["digits"], b, s) for b, s in ((math.inf, 4), (1.3, 4), (1.3, 5)))
    raw = {name.replace("parametrizations.weight.original", "weight"): p for name, p in capped.named_parameters()}
    assert {name: p.tolist() for name, p in plain.named_parameters()} == {name: p.tolist() for name, p in raw.items()}
    assert not torch.equal(plain.conv2.bias, other.conv2.bias)


def test_building_leaves_the_callers_random_state():
    before = torch.get_rng_state()
    demo_network(SHAPES["digits"], 1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_norms_are_those_of_the_dense_matrices_in_use():
    model = demo_network(SHAPES["digits"], 0.8, seed=0)
    sizes = {"conv1": (8, 8), "conv2": (8, 8), "conv3": (4, 4), "fc": None}
    dense = {name: operator_of(model.get_submodule(name), size).to_dense() for name, size in sizes.items()}
    exact = {name: torch.linalg.matrix_norm(matrix, 2).item() for name, matrix in dense.items()}
    assert layer_norms(model, SHAPES["digits"]) == pytest.approx(exact, rel=1e-4)


def test_beta_caps_every_layer():
    plain = layer_norms(demo_network(SHAPES["digits"], math.inf, seed=0), SHAPES["digits"])
    capped = layer_norms(demo_network(SHAPES["digits"], 0.9, seed=0), SHAPES["digits"])
    assert max(plain.values()) > 1
    # A few power iterations give sigma from below, so a capped norm may be a little above beta.
    assert capped == pytest.approx({name: min(0.9, norm) for name, norm in plain.items()}, rel=0.02)
