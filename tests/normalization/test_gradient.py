"""Gradients of the normalised weight, the operator library, and torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast import ConvOperator, MatrixOperator, apply_spectral_norm, update_spectral_norm
from sn_fast.norms.estimate import start_vectors
from sn_fast.ops.normalize import normalize
from sn_fast.ops.power_step import power_step
from sn_fast.reference import power
from sn_fast.reference.linear_map import weight_gradient

OPERATORS = {
    "matrix": lambda w=None: MatrixOperator(w if w is not None else torch.randn(4, 6, dtype=torch.float64)),
    "strided": lambda w=None: ConvOperator(
        w if w is not None else torch.randn(3, 2, 3, 2, dtype=torch.float64), (6, 7), stride=2, padding=((1, 0), (0, 1))
    ),
    "grouped": lambda w=None: ConvOperator(
        w if w is not None else torch.randn(4, 2, 3, dtype=torch.float64), (8,), padding=2, groups=2, dilation=2
    ),
    "reflect": lambda w=None: ConvOperator(
        w if w is not None else torch.randn(3, 2, 3, 3, dtype=torch.float64), (5, 6), padding=1, padding_mode="reflect"
    ),
    "transposed": lambda w=None: ConvOperator(
        w if w is not None else torch.randn(4, 2, 3, 3, dtype=torch.float64),
        (4, 3),
        stride=2,
        padding=1,
        output_padding=(1, 0),
        transposed=True,
        groups=2,
    ),
    "3d": lambda w=None: ConvOperator(
        w if w is not None else torch.randn(2, 2, 2, 2, 2, dtype=torch.float64), (3, 4, 3), stride=(1, 2, 1)
    ),
}


def state(op: sn_fast.LinearOperator) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[int]]:
    """u, v, sigma, group, geometry as a parametrization holds them, not yet converged."""
    u, v = start_vectors(op, 4)
    code = op.geometry.encode()
    (u,), (v,), (sigma,), (group,) = power_step([op.weight], [u], [v], code, 1)
    return u, v, sigma, group if op.geometry.groups > 1 else None, code


@pytest.mark.parametrize("name", OPERATORS)
def test_weight_gradient_is_the_derivative_of_the_bilinear_form(name: str) -> None:
    op = OPERATORS[name]()
    u, v = torch.randn(op.out_shape).double(), torch.randn(op.in_shape).double()
    weight = op.weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad((u * OPERATORS[name](weight).matvec(v)).sum(), weight)
    torch.testing.assert_close(weight_gradient(u, v, weight.shape, op.geometry), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_with_constant_vectors(name: str, cap: bool) -> None:
    """Against finite differences of W / max(1, <u, A(W) v> / beta) with u and v held fixed."""
    op = OPERATORS[name]()
    u, v, sigma, group, code = state(op)
    beta = float(sigma) / 3
    # sigma as a function of W alone, through its own definition, on the dense matrix of the group that attains it
    mask = torch.ones_like(u)
    if group is not None:
        mask = (torch.arange(op.geometry.groups) == group).double().repeat_interleave(u.numel() // op.geometry.groups)
        mask = mask.reshape(u.shape)

    def normalised(weight: Tensor) -> Tensor:
        value = (mask * u * OPERATORS[name](weight).matvec(v)).sum()
        return weight / (value / beta)

    direction = torch.randn_like(op.weight)
    weight = op.weight.clone().requires_grad_()
    out = normalize(weight, sigma, u, v, group, code, beta, cap)
    torch.testing.assert_close(out, op.weight / (sigma / beta), rtol=1e-14, atol=0)
    target = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * target).sum(), weight)
    step = 1e-6
    difference = (normalised(op.weight + step * direction) - normalised(op.weight - step * direction)) / (2 * step)
    # u here is of the current weight, so <u, A v> is sigma up to the iteration's own error
    scale = (mask * u * op.matvec(v)).sum() / sigma
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=1e-6, atol=0)
    torch.testing.assert_close((gradient * direction).sum(), (difference * target).sum(), rtol=1e-5, atol=1e-8)


def test_nothing_flows_through_sigma_where_nothing_is_cut() -> None:
    op = OPERATORS["strided"]()
    u, v, sigma, group, code = state(op)
    weight = op.weight.clone().requires_grad_()
    target = torch.randn_like(weight)
    out = normalize(weight, sigma, u, v, group, code, float(sigma) * 2, True)
    assert torch.equal(out, weight)
    assert torch.equal(torch.autograd.grad((out * target).sum(), weight)[0], target)


@pytest.mark.parametrize("name", OPERATORS)
def test_full_gradient_is_that_of_one_power_iteration(name: str) -> None:
    op = OPERATORS[name]()
    u, v, *_ = state(op)
    start = v if op.geometry.axes else u

    def sigma_of(weight: Tensor) -> Tensor:
        return power.sigma_through_last_iteration(weight, start, op.geometry)

    weight = op.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(sigma_of, weight, atol=1e-6)
    _, _, (sigma,), _ = power_step([op.weight], [u], [v], op.geometry.encode(), 1)
    torch.testing.assert_close(sigma_of(op.weight), sigma, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_double_backward(name: str) -> None:
    """A gradient penalty differentiates the gradient; both orders see the same function."""
    op = OPERATORS[name]()
    u, v, sigma, group, code = state(op)
    beta = float(sigma) / 2
    weight = op.weight.clone().requires_grad_()
    target = torch.randn_like(weight)

    def loss(weight: Tensor) -> Tensor:
        return (normalize(weight, sigma, u, v, group, code, beta, True) * target).pow(3).sum()

    (first,) = torch.autograd.grad(loss(weight), weight)
    (penalised,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    torch.testing.assert_close(penalised, first, rtol=1e-6, atol=1e-9)
    (second,) = torch.autograd.grad(penalised.square().sum(), weight)
    direction = torch.randn_like(weight)
    from sn_fast.reference import normalize as exact

    def exact_gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        out = exact.normalize(w, exact.rayleigh(w, u, v, group, op.geometry), beta, True)
        return torch.autograd.grad((out * target).pow(3).sum(), w)[0]

    step = 1e-5
    plus, minus = (exact_gradient(op.weight + s * step * direction).square().sum() for s in (1, -1))
    torch.testing.assert_close((second * direction).sum(), (plus - minus) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    op = OPERATORS[name]()
    u, v, sigma, group, code = state(op)
    w = op.weight
    torch.library.opcheck(torch.ops.sn_fast.power_step.default, ([w, w], [u, u], [v, v], code + code, 2))
    torch.library.opcheck(torch.ops.sn_fast.normalize.default, ([w, w], [sigma, sigma], [0.5, 2.0], [True, False]))
    torch.library.opcheck(
        torch.ops.sn_fast.normalize_backward.default,
        (torch.randn_like(w), w, sigma, u, v, group, code, 0.5, True),
    )


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_compiled_training_equals_eager(gradient: str, backend: str) -> None:
    x = torch.randn(4, 2, 8, 8)
    model = apply_spectral_norm(network(), x[:1], beta=0.4, gradient=gradient)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    for run, module in ((compiled, model), (twin, twin)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            if module is model:
                update_spectral_norm(module)
            losses.append(loss.detach())
        results.append(torch.stack(losses))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    twin(x)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_update(backend: str) -> None:
    model = apply_spectral_norm(network(), torch.randn(1, 2, 8, 8))
    twin = copy.deepcopy(model)
    torch.compile(update_spectral_norm, backend=backend, fullgraph=True)(model, 2)
    update_spectral_norm(twin, 2)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_export() -> None:
    x = torch.randn(2, 2, 8, 8)
    model = apply_spectral_norm(network(), x[:1], beta=0.4).eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-6, atol=1e-6)


def test_unknown_size_inside_compile_says_what_to_do() -> None:
    layer = sn_fast.spectral_norm(nn.Conv2d(2, 4, 3))
    torch._dynamo.reset()
    # Older versions of dynamo name the type of the error only.
    with pytest.raises(Exception, match=r"give input_size=|RuntimeError"):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(1, 2, 6, 6))


def test_compiled_model_inside_frozen_sigma_follows_the_weight_without_recompiling() -> None:
    x = torch.randn(4, 2, 8, 8)
    model = apply_spectral_norm(network(), x[:1], beta=0.4)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    compilations = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(4):
        with sn_fast.frozen_sigma(model):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)
        model(x).square().sum().neg().backward()
        optimizer.step()
    assert len(compilations) == 1
