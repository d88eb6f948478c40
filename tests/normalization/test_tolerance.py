"""tol=: norms in use stay within it, layers end each by itself, and no device is waited for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sn_fast
import sn_fast.ops.refresh as refresh
import sn_fast.ops.settled as settled
from sn_fast.normalization.checks import check_can_be_distributed
from sn_fast.normalization.options import Options
from sn_fast.reference.geometry import Geometry

from .cases import KINDS, full_state, made, norm_in_use, raw_norm, raw_of, same_bits
from .models import Operators, X, normalised, true_norms


def train(model: nn.Module, steps: int = 30, lr: float = 3e-3) -> float:
    """Train a network from its start; the largest norm in use in any forward, by singular value decomposition."""
    optimizer, worst = torch.optim.Adam(model.parameters(), lr), 0.0
    for i in range(steps):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(i))
        (model(x) - x.roll(1, 1).sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(x[:1])
        if i % 5 == 4:
            weights = [m.weight.detach().double() for m in model if isinstance(m, nn.Linear)]
            worst = max(worst, *(float(torch.linalg.matrix_norm(w, 2)) for w in weights))
    return worst


def deep(**options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return sn_fast.apply_spectral_norm(net, torch.randn(1, 64), mode="scale", **options)


@pytest.mark.parametrize("lr", [3e-3, pytest.param(1e-2, marks=pytest.mark.slow)])
def test_norms_in_training_stay_within_the_tolerance(lr: float) -> None:
    """The norms in use of one iteration, and of five, are far above 1 on the same data."""
    assert train(deep(), lr=lr) > 1.15
    assert train(deep(n_power_iterations=5), lr=lr) > 1.05
    for tol in (3e-2, 1e-2):
        assert 1 - 1e-5 < train(deep(tol=tol), lr=lr) < 1 + tol


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["layer", "model"])
@pytest.mark.parametrize("options", [{}, {"gradient": "full"}])
def test_every_kind_of_layer(kind: str, how: str, options: dict) -> None:
    model = made(kind, how, tol=1e-6, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        raw = raw_of(model)
        raw.data.add_(0.1 * torch.randn(raw.shape, generator=generator))
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=2e-3)
        before = full_state(model)
        model(KINDS[kind].batch()).sum().backward()
        assert same_bits(full_state(model), before)
    raw_of(model).data.normal_()  # a new start, found by itself
    assert norm_in_use(model, kind) == pytest.approx(1.0, rel=2e-3)
    sn_fast.update_spectral_norm(model, 1)
    assert next(iter(sn_fast.sigmas(model).values())) == pytest.approx(raw_norm(raw_of(model), kind), rel=2e-3)


def separate(*spectra: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Matrices with these singular values, and the vectors of a start that says little of them."""
    bases = [(torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(8, 8))[0]) for _ in spectra]
    weights = [left @ s.diag() @ right for s, (left, right) in zip(spectra, bases)]
    us = [nn.functional.normalize(torch.randn(8), dim=0) for _ in weights]
    return weights, us, [torch.zeros(8) for _ in weights], Geometry().encode() * len(weights)


GAP, CROWDED = torch.tensor([5.0, *[0.05] * 7]), torch.linspace(1.0, 0.93, 8)


def test_each_layer_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight with a gap needs three iterations; one without needs Lanczos, and does not take the other along."""
    weights, us, vs, code = separate(GAP, CROWDED)
    sigmas, asked = [torch.zeros(()), torch.zeros(())], []
    real = settled.lanczos_start
    monkeypatch.setattr(settled, "lanczos_start", lambda ws, *rest: (asked.extend(ws), real(ws, *rest))[1])
    refresh.advance(weights, us, vs, sigmas, [], [], code, 2, "fp32", 1e-3)
    assert 1 <= len(asked) <= settled.ROUNDS
    assert all(torch.equal(w, weights[1]) for w in asked)
    for sigma, norm in zip(sigmas, (5.0, 1.0)):
        assert float(sigma) == pytest.approx(norm, rel=1e-3)


def test_no_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on the host all is launched and chosen from; no number is read, and the results are the same."""
    weights, us, vs, code = separate(GAP, CROWDED)
    n, options = len(code) // 2, (2, "fp32", 1e-3)
    ended = [settled.settled([w], [u], [v], code[:n], *options) for w, u, v in zip(weights, us, vs)]
    monkeypatch.setattr(settled, "is_on_host", lambda device: False)
    with Operators() as operators:
        chosen = settled.settled(weights, us, vs, code, *options)
    assert operators.seen.count("sn_fast::lanczos_start") == settled.ROUNDS
    outside = {name for name in operators.seen if not name.startswith("sn_fast::")}
    assert not outside & {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}
    for i, alone in enumerate(ended):
        for column, wanted in zip(chosen, alone):
            assert torch.equal(column[i], wanted[0])  # what had ended did not move any more


def test_compiled_and_copied() -> None:
    torch._dynamo.reset()
    model = normalised(mode="scale", beta=1.0, tol=1e-5)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for m in (model, twin):
        for p in m.parameters():
            p.data.mul_(1.01).add_(0.01)
    compiled(X).sum().backward()
    model(X).sum().backward()
    assert same_bits(full_state(model), full_state(twin))
    assert true_norms(model, raw=False) == pytest.approx([1.0] * 4, rel=2e-3)


@pytest.mark.parametrize("tol", [0, 1.0, -1e-3, float("nan"), "1e-3", True])
def test_what_is_no_tolerance(tol: object) -> None:
    for call in (sn_fast.spectral_norm, lambda m, **k: sn_fast.apply_spectral_norm(m, torch.randn(1, 3), **k)):
        with pytest.raises(ValueError, match=r"tol=.* must be a number between 0 and 1, such as 1e-3, or None"):
            call(nn.Linear(3, 3), tol=tol)


def test_tensor_parallel_layers_have_none() -> None:
    with pytest.raises(ValueError, match=r"tol=0.01 needs the whole weight, and Linear is tensor-parallel"):
        check_can_be_distributed(nn.Linear(3, 3), True, False, Options(tol=1e-2))
