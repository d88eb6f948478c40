"""The constant of local response normalisation against the steepest inputs that a search finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_fast.experiments.networks import build_network
from sn_fast.experiments.networks.layers import LocalResponseNorm

from .truth import bound_of, report_of

CHANNELS = 9


def steepest_found(layer: nn.Module, scale: float) -> tuple[float, float]:
    """The largest norms of the Jacobian D - M and of M that gradient ascent on inputs finds."""

    def one(v: Tensor) -> Tensor:
        return layer(v.reshape(1, -1, 1, 1)).flatten()

    best = [0.0, 0.0]
    for which in (0, 1):
        x = (scale * torch.randn(24, CHANNELS, dtype=torch.float64)).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1 * scale)
        for _ in range(60):
            jacobians = torch.func.vmap(torch.func.jacrev(one))(x)
            decay = torch.diag_embed(layer(x.reshape(24, -1, 1, 1)).flatten(1) / x)
            norms = torch.linalg.matrix_norm(jacobians if which == 0 else decay - jacobians, 2)
            best[which] = max(best[which], float(norms.detach().max()))
            optimizer.zero_grad()
            (-norms.sum()).backward()
            optimizer.step()
    return best[0], best[1]


@pytest.mark.parametrize(
    ("layer", "k", "beta"),
    [
        (nn.LocalResponseNorm(5, alpha=5.0), 1.0, 0.75),
        (nn.LocalResponseNorm(4, alpha=4.0, beta=1.5), 1.0, 1.5),
        (nn.LocalResponseNorm(2, alpha=2.0, beta=4.0), 1.0, 4.0),
        (nn.LocalResponseNorm(1, alpha=1.0, beta=0.5), 1.0, 0.5),
        (nn.LocalResponseNorm(9, alpha=9.0, beta=0.75, k=2.0), 2.0, 0.75),
        (LocalResponseNorm(2, alpha=1.0), 1.0, 0.75),
        (LocalResponseNorm(4, bias=0.5, alpha=1.0, beta=2.0), 0.5, 2.0),
    ],
)
def test_no_input_is_steeper_than_the_constant(layer: nn.Module, k: float, beta: float) -> None:
    bound = bound_of(layer, torch.randn(1, CHANNELS, 2, 2, dtype=torch.float64))
    assert bound == pytest.approx(k**-beta * (1 + 2 * math.sqrt(2) * (beta / (beta + 1)) ** (beta + 1)), rel=1e-9)
    slope, coupling = steepest_found(layer, math.sqrt(k / beta))
    assert k**-beta * 0.5 < slope <= bound
    assert 0.5 * (bound - k**-beta) < coupling <= bound - k**-beta


def test_the_constant_does_not_depend_on_alpha_unless_it_is_zero() -> None:
    x = torch.randn(1, CHANNELS, 2, 2)
    assert bound_of(nn.LocalResponseNorm(5), x) == bound_of(nn.LocalResponseNorm(3, alpha=7.0), x)
    assert bound_of(nn.LocalResponseNorm(5, alpha=0.0, k=4.0, beta=0.5), x) == pytest.approx(0.5, rel=1e-9)
    assert bound_of(lambda v: F.local_response_norm(v, 5), x) == bound_of(nn.LocalResponseNorm(5), x)


@pytest.mark.parametrize("options", [{"k": 0.0}, {"alpha": -1.0}, {"beta": -0.5}, {"k": float("nan")}])
def test_what_has_no_bound_is_refused(options: dict[str, float]) -> None:
    report = report_of(nn.LocalResponseNorm(3, **options), torch.randn(1, CHANNELS, 2, 2))
    assert report.bound == math.inf
    assert "no bound" in str(report)


def test_the_published_alexnet_has_a_certified_constant() -> None:
    torch.manual_seed(0)
    model = build_network("alexnet_sn", in_channels=3, beta=1.0).eval()
    report = report_of(model, torch.randn(1, 3, 28, 28))
    responses = [row for row in report.layers if row.name.startswith("norm")]
    assert math.isfinite(report.bound)
    assert [row.constant for row in responses] == [pytest.approx(1.642, abs=1e-3)] * 2
