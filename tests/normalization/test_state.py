"""Sigma belongs to the weight in use: when u, v and sigma move, and when they must not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sn_fast
from sn_fast import apply_spectral_norm, frozen_sigma, operator_norm, operator_of, sigmas, update_spectral_norm
from sn_fast.ops.precision import resolved

from ..on_device import DEVICE
from .models import X, network, normalised, states, step, true_norms, unchanged


def test_every_layer_is_at_most_beta_from_the_start() -> None:
    model = normalised(beta=0.3)
    for used, raw, sigma in zip(true_norms(model, raw=False), true_norms(model, raw=True), sigmas(model).values()):
        assert raw > 0.3
        assert sigma == pytest.approx(raw, rel=5e-3)
        assert used == pytest.approx(0.3, rel=5e-3)


def test_state_moves_once_per_weight_change_and_never_otherwise() -> None:
    model = normalised()
    before = states(model)
    for _ in range(3):
        model(X).sum().backward()
        model.eval()(X)
        model.train()
    assert unchanged(model, before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    reference = copy.deepcopy(model)  # a copy carries no pending change
    after = states(model)
    assert not unchanged(model, before)
    model(X)
    model(X)
    assert unchanged(model, after)
    assert unchanged(reference, after)


def test_whole_group_advances_in_one_operator_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from sn_fast.ops import refresh

    calls = []
    real = refresh.power_step
    monkeypatch.setattr(refresh, "power_step", lambda *a: calls.append(len(a[0])) or real(*a))
    model = normalised()
    calls.clear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, X, optimizer)
    assert calls == []
    model(X)
    assert calls == [4]


def test_one_step_of_power_iteration_from_the_stored_vector() -> None:
    """What moves is exactly one published iteration: u = A v / |A v|, w = A^T u, sigma = |w|, v = w / sigma."""
    model = normalised()
    p = model[0].parametrizations.weight[0]
    v = p.v.clone().double()
    with torch.no_grad():
        model[0].parametrizations.weight.original.add_(0.01 * torch.randn_like(p.raw))
    model(X)
    op = operator_of(model[0], raw=True)
    op = sn_fast.ConvOperator(op.weight.detach().double(), (8, 8), stride=2, padding=1)
    u = op.matvec(v)
    u = u / u.norm()
    w = op.rmatvec(u)
    torch.testing.assert_close(p.u.double(), u, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.v.double(), w / w.norm(), rtol=0, atol=1e-6)
    torch.testing.assert_close(p.sigma.double(), w.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_every_optimizer_is_noticed_also_the_fused_ones(kind: type, fused: bool) -> None:
    """Fused optimizers do not bump the version counter of what they write."""
    model = normalised()
    optimizer = kind(model.parameters(), lr=0.05, fused=fused)
    before = states(model)
    step(model, X, optimizer)
    model(X)
    assert not unchanged(model, before)
    assert list(sigmas(model).values()) == pytest.approx(true_norms(model, raw=True), rel=0.05)


def test_writes_to_lists_are_noticed_also_under_a_dispatch_mode() -> None:
    """There they bump no version counter, and they are what optimizers do by default on a GPU."""
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=True)
    before = states(model)
    with FlopCounterMode(display=False):
        step(model, X, optimizer)
        model(X)
        after, versions = states(model), [b._version for b in model.buffers()]
        update_spectral_norm(model)
    assert not unchanged(model, before)
    assert not unchanged(model, after)
    assert all(b._version > version for b, version in zip(model.buffers(), versions, strict=True))


def test_frozen_layers_do_not_move_with_the_others() -> None:
    model = normalised()
    model[0].requires_grad_(False)
    before = model[0].parametrizations.weight[0].v.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    step(model, X, optimizer)
    model(X)
    assert torch.equal(model[0].parametrizations.weight[0].v, before)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, X, optimizer)
    optimizer.zero_grad()
    model(X).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    for part in X.split(1):
        model(part).sum().backward()
    for p, g in zip(model.parameters(), whole):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_sigma(reentrant: bool) -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, X, optimizer)
    optimizer.zero_grad()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    plain, before = [p.grad.clone() for p in model.parameters()], states(model)
    optimizer.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert unchanged(model, before)
    for p, g in zip(model.parameters(), plain):
        assert torch.equal(p.grad, g)


def test_checkpoint_of_the_first_use_after_a_step() -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        step(m, X, optimizer)
        optimizer.zero_grad()
    checkpoint(model, X, use_reentrant=False).sum().backward()
    twin(X).sum().backward()
    assert unchanged(model, states(twin))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_second_backward_through_one_graph() -> None:
    model = normalised()
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), first):
        torch.testing.assert_close(p.grad, 2 * g, rtol=0, atol=0)


def test_eval_and_no_grad_use_the_sigma_of_the_current_weight() -> None:
    model = normalised(beta=0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    model.eval()
    with torch.no_grad():
        model(X)
    assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)


def test_inference_mode_leaves_a_usable_state() -> None:
    model = sn_fast.spectral_norm(nn.Conv2d(2, 3, 3))
    with torch.inference_mode():
        model(X)
        with torch.no_grad():
            model.parametrizations.weight.original.mul_(2.0)
        model(X)
    model(X).sum().backward()
    assert float(operator_norm(operator_of(model))) == pytest.approx(1.0, rel=5e-3)


def test_ema_swap_of_weights_and_vectors() -> None:
    """An average shrinks u, v and sigma; the average's own sigma counts, by an in-place swap and by load_state_dict."""
    model = normalised(beta=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True
    )
    for _ in range(12):
        step(model, torch.randn_like(X), optimizer)
        averaged.update_parameters(model)
    averaged.eval()(X)
    raw, used = true_norms(averaged.module, raw=True), true_norms(averaged.module, raw=False)
    assert list(sigmas(averaged.module).values()) == pytest.approx(raw, rel=0.02)
    assert used == pytest.approx([min(0.3, r) for r in raw], rel=0.02)
    shrunk = {k: v * 0.9 if k.endswith((".u", ".v")) else v for k, v in averaged.module.state_dict().items()}
    fresh = normalised(beta=0.3)
    fresh.load_state_dict(shrunk)
    fresh.eval()(X)
    assert true_norms(fresh, raw=False) == pytest.approx(used, rel=0.02)
    assert fresh[0].parametrizations.weight[0].v.norm() == pytest.approx(1.0, rel=1e-5)


def test_averaging_the_vectors_too_is_no_worse_than_averaging_weights_alone() -> None:
    """Under use_buffers=True the average's u and v are averages, and no vectors of the averaged weight."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ELU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ELU())
    model = nn.Sequential(*first, nn.Flatten(), nn.Linear(128, 32), nn.ELU(), nn.Linear(32, 4))
    apply_spectral_norm(model, X[:1], mode="scale")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averages = [torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=b) for b in (False, True)]
    alone, both = [], []
    for i in range(40):
        x = torch.randn(32, 2, 8, 8)
        (model(x) - x.flatten(1)[:, :4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for average, errors in zip(averages, (alone, both)):
            average.update_parameters(model)
            if i % 10 == 9:
                average(X)
                convolution = operator_norm(operator_of(average.module[2], (8, 8)), method="dense")
                matrix = torch.linalg.matrix_norm(average.module[5].weight.detach(), 2)
                errors.append(max(abs(float(n) - 1) for n in (convolution, matrix)))
    assert max(both) <= max(alone)
    assert max(both) < 0.02


def test_ema_average_of_states_without_buffers_is_noticed_on_loading() -> None:
    model, fresh = normalised(beta=0.3), normalised(beta=0.3)
    state = model.state_dict()
    state = {k: 0.5 * v if k.endswith("original") else v for k, v in state.items()}  # sigma no longer fits
    fresh.load_state_dict(state)
    fresh(X)
    assert list(sigmas(fresh).values()) == pytest.approx(true_norms(fresh, raw=True), rel=5e-3)


def test_zero_weight_stays_zero_and_comes_alive() -> None:
    for mode in ("cap", "scale"):
        layer = nn.Linear(6, 4)
        nn.init.zeros_(layer.weight)
        sn_fast.spectral_norm(layer, mode=mode)
        assert torch.equal(layer.weight, torch.zeros(4, 6))
        layer(torch.randn(2, 6)).sum().backward()
        raw = layer.parametrizations.weight.original
        assert torch.isfinite(raw.grad).all()
        with torch.no_grad():
            raw.copy_(torch.randn(4, 6))
        for _ in range(60):
            update_spectral_norm(layer)
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, rel=1e-3)


def test_infinite_beta_leaves_every_bit() -> None:
    model = network()
    weights = [m.weight.clone() for m in model if hasattr(m, "weight")]
    out = model(X)
    apply_spectral_norm(model, X[:1], beta=float("inf"))
    assert all(torch.equal(m.weight, w) for m, w in zip([m for m in model if hasattr(m, "weight")], weights))
    assert torch.equal(model(X), out)


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-3, 1e3, 1e25])
def test_a_tiny_or_huge_weight_normalises_like_any_other(scale: float) -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight.mul_(scale)
    sn_fast.spectral_norm(layer, input_size=(6, 6), mode="scale")
    assert float(operator_norm(operator_of(layer))) == pytest.approx(1.0, rel=5e-3)


def test_a_nan_weight_does_not_spoil_the_state() -> None:
    layer = sn_fast.spectral_norm(nn.Linear(4, 3))
    good = layer.parametrizations.weight.original.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = float("nan")
    assert layer(torch.randn(2, 4)).isnan().any()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(good)
    assert torch.isfinite(layer(torch.randn(2, 4))).all()
    assert sigmas(layer)[""] == pytest.approx(float(torch.linalg.matrix_norm(good, 2)), rel=1e-3)


def test_mode_cap_and_scale() -> None:
    small = nn.Linear(5, 5)
    with torch.no_grad():
        small.weight.mul_(0.1)
    weight = small.weight.detach().clone()
    sigma = float(torch.linalg.matrix_norm(weight, 2))
    capped = sn_fast.spectral_norm(copy.deepcopy(small), beta=2.0)
    assert torch.equal(capped.weight, weight)
    scaled = sn_fast.spectral_norm(copy.deepcopy(small), beta=2.0, mode="scale")
    torch.testing.assert_close(scaled.weight, weight * (2.0 / sigma), rtol=1e-3, atol=0)


def test_frozen_sigma_computes_each_weight_once_and_moves_nothing() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, X, optimizer)
    expected = copy.deepcopy(model)(X)
    model(X)
    before = states(model)
    with frozen_sigma(model):
        assert model[0].weight is model[0].weight
        assert not model[0].weight.requires_grad
        assert torch.equal(model(X), expected)
        with frozen_sigma(model):
            model(X)
        assert model[0].weight is model[0].weight
    assert model[0].weight.requires_grad
    assert unchanged(model, before)
    with pytest.raises(RuntimeError, match="inside"), frozen_sigma(model):
        raise RuntimeError("inside")
    assert model[0].weight.requires_grad


def test_frozen_sigma_right_after_a_step_uses_the_new_weight() -> None:
    model = normalised(beta=0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    with frozen_sigma(model):
        assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)


def test_update_advances_now_and_the_next_use_does_not() -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    update_spectral_norm(model)
    after = states(model)
    model(X)
    assert unchanged(model, after)
    update_spectral_norm(model, n_power_iterations=200)
    assert list(sigmas(model).values()) == pytest.approx(true_norms(model, raw=True), rel=1e-4)


def test_post_step_hook_serves_writes_that_bypass_the_version_counter() -> None:
    model = normalised(beta=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: update_spectral_norm(model))
    for p in model.parameters():
        p.data.mul_(2.0)
    optimizer.step()
    assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_is_no_change_of_weight(dtype: torch.dtype) -> None:
    model = normalised(beta=0.3)
    sigma = sigmas(model)
    before = states(model)
    model.to(dtype)
    p = model[0].parametrizations.weight[0]
    assert p.sigma.dtype == torch.promote_types(dtype, torch.float32)
    assert model[0].weight.dtype == dtype
    assert sigmas(model) == sigma
    assert all(torch.equal(a.to(b), b) for a, b in zip(states(model), before))
    loss = model(X.to(dtype)).sum()
    loss.backward()
    step(model, X.to(dtype), torch.optim.SGD(model.parameters(), 0.1))
    model(X.to(dtype))
    assert sigmas(model) != sigma


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="fp32_precision is of torch 2.9")
@pytest.mark.parametrize(("setting", "products"), [("ieee", "fp32"), ("tf32", "tf32")])
def test_both_ways_to_set_the_precision_of_products(setting: str, products: str) -> None:
    """PyTorch refuses to name the older setting where the newer one says tf32."""
    model, before = normalised(), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        step(model, X, torch.optim.SGD(model.parameters(), 0.1))
        model(X)
        assert resolved(model[0].parametrizations.weight[0].options.product_precision) == products
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_autocast() -> None:
    model = normalised()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model[0].parametrizations.weight[0].v.dtype == torch.float32
