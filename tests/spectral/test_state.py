"""Sigma belongs to the weight in use: when u, v and sigma move, and when they must not (DESIGN 7)."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sn_fast
from sn_fast import apply_spectral_norm, frozen_sigma, operator_norm, operator_of, sigmas, update_spectral_norm
from sn_fast.spectral.parametrization import SpectralNorm


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ELU(),
        nn.Conv2d(6, 4, 1),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def normalised(beta: float = 0.7, **options) -> nn.Sequential:
    return apply_spectral_norm(network(), torch.randn(1, 2, 8, 8), beta=beta, **options)


def states(model: nn.Module) -> list[Tensor]:
    return [b.clone() for m in model.modules() if isinstance(m, SpectralNorm) for b in m.buffers()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def true_norms(model: nn.Module, *, raw: bool) -> list[float]:
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [float(operator_norm(operator_of(m, raw=raw), method="dense")) for m in layers]


X = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))


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
    from sn_fast.spectral import group

    calls = []
    real = group.ops.power_step
    monkeypatch.setattr(group.ops, "power_step", lambda *a: calls.append(len(a[0])) or real(*a))
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


def test_deepcopy_is_independent_and_no_change() -> None:
    model = normalised()
    model(X)
    before = states(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert unchanged(twin, before)
    step(twin, X, torch.optim.SGD(twin.parameters(), 0.5))
    twin(X)
    assert unchanged(model, before)
    assert not unchanged(twin, before)


def test_deepcopy_sees_a_change_made_before_its_first_use() -> None:
    """The usual EMA: copy, update the copy in place, and only then use it."""
    twin = copy.deepcopy(normalised(beta=0.3))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2.0)
    twin.eval()(X)
    assert true_norms(twin, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)


def test_deepcopy_of_one_layer_does_not_drag_the_model_along() -> None:
    model = normalised()
    layer = copy.deepcopy(model[0])
    members = layer.parametrizations.weight[0]._group.members()
    assert len(members) == 1
    assert members[0] is layer.parametrizations.weight[0]


def test_state_dict_round_trip_is_strict_and_no_change() -> None:
    model, twin = normalised(), normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert unchanged(twin, states(model))
    assert torch.equal(twin(X), model(X))
    assert unchanged(twin, states(model))


def test_saving_takes_a_pending_change_along() -> None:
    """Saved right after a step, before the next forward: sigma in the file belongs to the weight in the file."""
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.5))
    state = model.state_dict()
    assert state["0.parametrizations.weight.0.sigma"].item() == sigmas(model)["0"]
    before = states(model)
    model(X)
    assert unchanged(model, before)


@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_resume_is_bit_identical(gradient: str) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
            step(model, x, optimizer)

    model = normalised(gradient=gradient)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    resumed = normalised(gradient=gradient)
    optimizer = torch.optim.SGD(resumed.parameters(), 0.1, momentum=0.9)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, range(4, 8))
    never_saved = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    train(twin, never_saved, range(8))
    for other in (resumed, twin):
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
            assert torch.equal(a, b), name


def test_a_layer_without_known_size_loads_a_checkpoint_before_its_first_forward() -> None:
    def lazy() -> nn.Sequential:
        model = network()
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                sn_fast.spectral_norm(module, beta=0.5)
        return model

    trained = lazy()
    trained(X)
    fresh = lazy()
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert unchanged(fresh, states(trained))
    assert torch.equal(fresh(X), trained(X))
    assert unchanged(fresh, states(trained))
    untouched = lazy()
    untouched.load_state_dict(lazy().state_dict(), strict=True)
    untouched(X)


def test_plain_weights_loaded_without_vectors_get_a_fresh_start() -> None:
    model, other = normalised(beta=0.3), normalised(beta=0.3)
    step(other, X, torch.optim.SGD(other.parameters(), 1.0))
    weights = {k: v for k, v in other.state_dict().items() if not k.endswith((".u", ".v", ".sigma", ".top_group"))}
    model.load_state_dict(weights, strict=False)
    assert list(sigmas(model).values()) == pytest.approx(true_norms(model, raw=True), rel=5e-3)


def test_a_torch_spectral_norm_checkpoint_loads() -> None:
    theirs = network()
    for module in theirs:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            torch.nn.utils.parametrizations.spectral_norm(module)
    for _ in range(200):
        theirs(X)
    theirs.eval()
    # The reshaped operator is theirs: the same function.
    ours = apply_spectral_norm(network(), X[:1], operator="reshape", mode="scale")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(X), theirs(X), rtol=1e-4, atol=1e-6)
    p, q = ours[0].parametrizations.weight[0], theirs[0].parametrizations.weight[0]
    torch.testing.assert_close(p.u, q._u, rtol=0, atol=1e-4)
    torch.testing.assert_close(p.v, q._v, rtol=0, atol=1e-4)
    # The true operator: weights load, vectors start afresh, also where the size is not known yet.
    for true in (normalised(beta=0.3), sn_fast.spectral_norm(nn.Conv2d(2, 6, 3, stride=2, padding=1), beta=0.3)):
        state = theirs.state_dict() if isinstance(true, nn.Sequential) else theirs[0].state_dict()
        true.load_state_dict(state, strict=True)
        true(X)
        assert true_norms(true, raw=False)[0] == pytest.approx(0.3, rel=5e-3)


def test_torch_save_of_a_whole_module_says_to_save_state_dict() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(normalised(), io.BytesIO())


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


def test_autocast() -> None:
    model = normalised()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model[0].parametrizations.weight[0].v.dtype == torch.float32
