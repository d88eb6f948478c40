"""Gains of perturbations, by layer and by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sn_fast import apply_spectral_norm, register_layer
from sn_fast.layers.kinds import unregister_layer
from sn_fast.theory import amplification
from sn_fast.theory.amplification import doubled_pass


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.ELU(), nn.Flatten(),
        nn.Linear(8, 4),
    ).to(dtype)  # fmt: skip


def lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def test_gains_are_those_of_each_layer_on_its_own():
    model = network()
    x, delta = torch.rand(5, 1, 6, 6).double(), 0.1 * torch.randn(5, 1, 6, 6).double()
    found = amplification(model, x, delta)
    gains, cumulative = [], []
    a, b = x, x + delta
    for layer in model:
        after = layer(a.clone()), layer(b.clone())
        if not isinstance(layer, (nn.ReLU, nn.ELU, nn.Flatten)):
            gains.append(lengths(after[1] - after[0]) / lengths(b - a))
            cumulative.append(lengths(after[1] - after[0]) / lengths(delta))
        a, b = after
    assert found.layers == ("0", "2", "5")
    assert torch.allclose(found.gain, torch.stack(gains, 1))
    assert torch.allclose(found.cumulative, torch.stack(cumulative, 1))
    assert torch.allclose(found.signals, torch.stack(cumulative, 1).log())
    assert torch.allclose(found.logits, model(x))
    assert not found.gain.requires_grad


def test_no_gain_exceeds_the_norm_and_the_singular_vector_attains_it():
    model = network()
    x = torch.rand(64, 1, 6, 6).double()
    found = amplification(model, x, torch.randn(64, 1, 6, 6).double())
    assert bool((found.gain <= found.norms * (1 + 1e-9)).all())
    assert bool((found.share <= 1 + 1e-9).all())
    dense = torch.autograd.functional.jacobian(model[0], torch.zeros(1, 1, 6, 6).double()).reshape(-1, 36)
    _, s, vh = torch.linalg.svd(dense)
    assert float(found.norms[0]) == pytest.approx(float(s[0]), rel=1e-6)
    along = amplification(model, x[:1], vh[:1].reshape(1, 1, 6, 6))
    assert float(along.gain[0, 0]) == pytest.approx(float(s[0]), rel=1e-6)
    assert float(along.share[0, 0]) == pytest.approx(1.0, rel=1e-6)


def test_the_product_of_gains_is_the_cumulative_gain_without_activations():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    x, delta = torch.rand(2, 7, 4).double()
    found = amplification(model, x, delta)
    assert torch.allclose(found.gain.cumprod(1), found.cumulative)


def test_samples_do_not_mix_and_a_sample_without_a_perturbation_has_no_gain():
    model = network()
    x, delta = torch.rand(4, 1, 6, 6).double(), torch.randn(4, 1, 6, 6).double()
    delta[1] = 0
    found = amplification(model, x, delta)
    assert found.gain[1].tolist() == [0.0] * 3
    assert bool(found.signals.isfinite().all())
    assert found.signals[1].tolist() == pytest.approx([math.log(1e-12)] * 3)
    alone = amplification(model, x[2:3], delta[2:3])
    assert torch.allclose(alone.gain[0], found.gain[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_rounding_is_no_gain(dtype: torch.dtype, seed: int):
    """The two halves of a batch are rounded differently, also where they are equal."""
    torch.manual_seed(seed)
    n, width, hidden = (int(k) for k in torch.randint(1, 40, (3,)))
    model = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 9), nn.ELU(), nn.Linear(9, 3)).to(
        dtype
    )
    x = torch.randn(n + 1, width).to(dtype)
    delta = torch.zeros_like(x)
    delta[0] = 1
    found = amplification(model, x, delta)
    assert not found.gain[1:].any()
    assert not found.cumulative[1:].any()
    assert bool((found.gain[0] > 0).all())


def test_what_is_not_finite_has_no_number():
    model, x = network(), torch.rand(4, 1, 6, 6).double()
    delta = 0.1 * torch.randn_like(x)
    x[1, 0, 2, 3], delta[2, 0, 0, 0] = torch.nan, torch.inf
    found = amplification(model, x, delta)
    assert found.gain.isnan().any(dim=1).tolist() == [False, True, True, False]
    assert torch.allclose(found.gain[[0, 3]], amplification(model, x[[0, 3]], delta[[0, 3]]).gain)


def test_nothing_is_left_behind():
    model = network(torch.float32)
    apply_spectral_norm(model, torch.rand(1, 1, 6, 6), beta=0.8)
    model.insert(3, nn.BatchNorm2d(2))
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    x = torch.rand(3, 1, 6, 6, requires_grad=True)
    found = amplification(model, x, torch.randn(3, 1, 6, 6))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert x.grad is None
    assert bool((found.norms <= 0.8 * (1 + 1e-2)).all())
    text = str(found)
    assert "cumulative" in text
    assert len(text.splitlines()) == 4


def test_branches_repeated_nested_and_registered_layers():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc(x.tanh())

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.base = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.base(x)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x @ self.weight.T

    from sn_fast import MatrixOperator

    register_layer(Doubled, operator=lambda module, weight, size: MatrixOperator(2 * weight))
    try:
        found = amplification(nn.Sequential(Inner(), Adapted(), Doubled()), torch.rand(3, 4), torch.rand(3, 4))
        assert found.layers == ("0.fc", "0.fc (2)", "1", "1.base", "2")
        assert found.gain[:, 4].tolist() == pytest.approx([2.0] * 3, rel=1e-4)
        assert float(found.norms[4]) == pytest.approx(2.0)
        assert bool((found.gain <= found.norms * (1 + 1e-4)).all())
    finally:
        unregister_layer(Doubled)


def test_signals_can_be_climbed():
    model = network().eval()
    x = torch.rand(2, 1, 6, 6).double().requires_grad_()
    delta = 0.1 * torch.randn(2, 1, 6, 6).double()
    assert torch.autograd.gradcheck(lambda x: doubled_pass(model, x, delta).cumulative.log().sum(1), (x,))


@pytest.mark.parametrize(
    ("x", "delta", "error", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 3), ValueError, "delta has shape"),
        (torch.zeros(2, 4), torch.zeros(2, 4).double(), TypeError, "delta has dtype"),
        (torch.zeros(2, 4).long(), torch.zeros(2, 4).long(), TypeError, "x must be floating point"),
        (torch.zeros(0, 4), torch.zeros(0, 4), ValueError, "x has no samples"),
    ],
)
def test_bad_input(x, delta, error, message):
    with pytest.raises(error, match=message):
        amplification(nn.Linear(4, 2), x, delta)


def test_networks_without_rows_of_samples_are_refused():
    x = torch.rand(2, 4)
    with pytest.raises(TypeError, match="model is a function"):
        amplification(lambda x: x, x, x)
    with pytest.raises(ValueError, match="runs no Linear"):
        amplification(nn.ELU(), x, x)

    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(0, keepdim=True)

    with pytest.raises(ValueError, match="not rows of 4 samples"):
        amplification(Mean(4, 2), x, x)
