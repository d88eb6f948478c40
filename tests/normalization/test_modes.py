"""The state where something stands between the model and its operators: transforms, dispatch modes, compilation."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast import sigmas, update_spectral_norm
from sn_fast.normalization.parametrization import SpectralNorm

from .models import Operators, X, normalised, states, step, true_norms, unchanged


def by_a_little(p: Tensor) -> None:
    p.data.add_(0.01 * torch.randn_like(p))


def replaced(p: Tensor) -> None:
    p.data.normal_()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x[:, :, :3, :3].contiguous()),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(lambda y: f(y[None]))(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y[None])))(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x[:1, :, :2, :2].contiguous()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("move", [by_a_little, replaced])
def test_weights_that_moved_before_a_transform(transform: str, move: Callable[[Tensor], None]) -> None:
    """The state moves within it as it would have before."""
    model = sn_fast.apply_spectral_norm(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        X[:1],
        beta=0.3,
    )
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        move(p)
        q.data.copy_(p)
    twin(X)  # before it
    found, wanted = (TRANSFORMS[transform](lambda x, m=m: m(x).square().sum(), X) for m in (model, twin))
    assert unchanged(model, states(twin))
    for a, b in zip(*([r] if isinstance(r, Tensor) else list(r) for r in (found, wanted)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model(X), twin(X))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp"])
def test_another_parametrization_within_a_transform(transform: str) -> None:
    """What it makes there is a tensor of the transform's."""
    layer = sn_fast.spectral_norm(nn.Linear(6, 4), beta=0.1)
    layer.parametrizations.weight.insert(0, Halved())
    x = torch.randn(5, 6)
    layer.parametrizations.weight.original.data.normal_()
    twin = copy.deepcopy(layer)
    layer.parametrizations.weight.original.data.normal_()
    twin.parametrizations.weight.original.data.copy_(layer.parametrizations.weight.original)
    twin(x)
    found, wanted = (TRANSFORMS[transform](lambda y, m=m: m(y).square().sum(), x) for m in (layer, twin))
    torch.testing.assert_close(found, wanted)
    assert unchanged(layer, states(twin))
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(0.1, rel=0.01)


def test_a_first_forward_within_a_transform_starts_the_state() -> None:
    layer = sn_fast.spectral_norm(nn.Conv2d(2, 3, 3), beta=0.1)
    torch.func.vmap(torch.func.grad(lambda x: layer(x[None]).sum()))(X)
    assert true_norms(layer, raw=False) == pytest.approx([0.1], rel=5e-3)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_forward_under_a_dispatch_mode_has_one_call_for_all(gradients: bool) -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    twin = copy.deepcopy(model)
    with torch.set_grad_enabled(gradients), Operators() as operators:
        found = model(X)
    assert operators.seen.count("sn_fast::refresh") == 1
    assert torch.equal(found, twin(X))


def emptied(model: nn.Module) -> None:
    """As a model that was built on the meta device and filled afterwards: nothing is known of u and v."""
    filled = [torch.randn_like(p) for p in model.parameters()]
    model.to("meta").to_empty(device="cpu")
    for p, value in zip(model.parameters(), filled, strict=True):
        p.data.copy_(value)
    for m in model.modules():
        if isinstance(m, SpectralNorm):
            assert m.record is None
            for b in m.buffers():
                b.fill_(float("nan") if b.is_floating_point() else 0)


def test_a_state_that_is_unknown_starts_anew_under_a_dispatch_mode() -> None:
    model = normalised(beta=0.3)
    emptied(model)
    with Operators():
        model(X)
    assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)


def test_an_update_starts_a_state_that_is_unknown() -> None:
    model = normalised(beta=0.3)
    emptied(model)
    update_spectral_norm(model)
    assert list(sigmas(model).values()) == pytest.approx(true_norms(model, raw=True), rel=5e-3)


def test_a_compiled_update_refuses_a_state_that_is_unknown() -> None:
    model = normalised(beta=0.3)
    for m in model.modules():
        if isinstance(m, SpectralNorm):
            m.record = None
    # torch 2.7 does not repeat the message of what is raised in compiled code.
    with pytest.raises(Exception, match=r"cannot start it anew|Observed exception"):
        torch.compile(lambda: update_spectral_norm(model), backend="eager", fullgraph=True)()


@pytest.mark.parametrize("n", [None, 3])
def test_an_update_of_replaced_weights_starts_anew(n: int | None) -> None:
    """One iteration from vectors of other weights can be far too low."""
    model = normalised(beta=0.3)
    for p in model.parameters():
        p.data.normal_()
    update_spectral_norm(model, n)
    before = states(model)
    assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)
    assert unchanged(model, before)


def test_an_update_after_a_change_of_a_layers_settings() -> None:
    layer = sn_fast.spectral_norm(nn.Conv2d(2, 4, 3, padding=1), input_size=(8, 8), beta=0.1)
    layer.stride = (2, 2)
    update_spectral_norm(layer)
    layer(X)
    wanted = sn_fast.operator_norm(sn_fast.operator_of(layer, (8, 8), raw=True), method="dense")
    assert float(layer.parametrizations.weight[0].sigma) == pytest.approx(float(wanted.detach()), rel=5e-3)


@pytest.mark.parametrize("where", ["renew", "power_step"])
def test_a_refresh_that_fails_is_made_up_for(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails at a later layer, when an earlier one's record is of the new weight already."""
    model = normalised(beta=0.3, mode="scale")
    for p in model.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    broken = {"renew": (SpectralNorm, "renew"), "power_step": (sys.modules["sn_fast.ops.refresh"], "power_step")}[where]
    real, calls = getattr(*broken), []

    def fails(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3 or where == "power_step":
            raise RuntimeError("out of memory, say")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(*broken, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(X)
    model(X)
    assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=0.02)
    assert list(sigmas(model).values()) == pytest.approx(true_norms(model, raw=True), rel=0.02)
