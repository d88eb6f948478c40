"""Weights from outside (functional_call, torch.func, ensembles): each is normalised by its own sigma, and the model's
own state, output and record keep every bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import parametrize

import sn_fast
from sn_fast import frozen_sigma

from .cases import HOWS, KINDS, full_state, layer_of, made, norm_of, raw_norm, raw_of, same_bits

OPTIONS = {
    "scale": {},
    "cap": {"mode": "cap", "beta": 0.5},
    "full": {"gradient": "full"},
    "bound": {"bound": True},
    "reshape": {"operator": "reshape"},
}


def weights_of(model: nn.Module, change: str, seed: int = 3) -> dict[str, Tensor]:
    """Other values for all parameters of a model."""
    generator = torch.Generator().manual_seed(seed)

    def other(p: Tensor) -> Tensor:
        random = torch.randn(p.shape, generator=generator).to(p.dtype)
        return {"scaled": 10 * p.detach(), "random": random, "near": p.detach() + 0.05 * random}[change]

    return {name: other(p) for name, p in model.named_parameters()}


def raw_name(model: nn.Module) -> str:
    return next(name for name, p in model.named_parameters() if p is raw_of(model))


def norm_given(model: nn.Module, given: dict[str, Tensor], kind: str) -> float:
    """The norm of a layer with weights from outside."""
    return norm_of(lambda x: functional_call(model, given, (x,)), KINDS[kind].shape)


class Untouched:
    """Checks that a model's own state, record and output have the bits that they had before."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model, self.x = model, KINDS[kind].batch().to(raw_of(model).dtype)

    def __enter__(self) -> None:
        self.output, self.state = self.model(self.x).detach(), full_state(self.model)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            assert same_bits(full_state(self.model), self.state)
            assert torch.equal(self.model(self.x), self.output)
            assert same_bits(full_state(self.model), self.state)


def as_tensors(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return given


def as_parameters(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: nn.Parameter(value) for name, value in given.items()}


def of_another_model(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(given[name])
    return dict(other.named_parameters())


@pytest.mark.parametrize("form", [as_tensors, as_parameters, of_another_model])
@pytest.mark.parametrize("change", ["scaled", "random", "near"])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_normalises_what_it_is_given(kind: str, change: str, form: Callable) -> None:
    for i, how in enumerate(HOWS):
        model = made(kind, how).train(i == 0)
        given = form(model, weights_of(model, change))
        with Untouched(model, kind):
            for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
                with context():
                    norm = norm_given(model, given, kind)
                assert norm == pytest.approx(1.0, rel=6e-3)
            with frozen_sigma(model):
                norm = norm_given(model, given, kind)
            assert norm == pytest.approx(1.0, rel=6e-3)


@pytest.mark.parametrize("change", ["scaled", "random"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind: str, options: str, change: str) -> None:
    model = made(kind, "model", **OPTIONS[options])
    given = weights_of(model, change)
    raw = given[raw_name(model)]
    with Untouched(model, kind):
        norm = norm_given(model, given, kind)
    if options == "bound":
        assert norm <= 1.0 + 1e-6
        assert norm > 0.5
    elif options == "reshape":
        # torch's matrix of a transposed convolution has the output channels as rows too.
        rows = 1 if kind == "transposed" else 0
        reshaped = float(torch.linalg.matrix_norm(raw.movedim(rows, 0).flatten(1), 2))
        assert norm == pytest.approx(raw_norm(raw, kind) / reshaped, rel=6e-3)
    elif options == "cap":
        assert norm == pytest.approx(min(0.5, raw_norm(raw, kind)), rel=6e-3)
    else:
        assert norm == pytest.approx(1.0, rel=6e-3)


def test_under_the_cap_the_weight_is_left_alone() -> None:
    for kind in KINDS:
        model = made(kind, "model", mode="cap")
        given = {name: 0.01 * p.detach() for name, p in model.named_parameters()}
        weight = functional_call(model, given, (KINDS[kind].batch(),))
        plain = KINDS[kind].make()
        plain.load_state_dict({"weight": given["0.parametrizations.weight.original"], "bias": given["0.bias"]})
        torch.testing.assert_close(weight, plain(KINDS[kind].batch()), rtol=0, atol=0)


# -- gradients --------------------------------------------------------------------------------------------------------


def apply_layer(layer: nn.Module, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.ConvTranspose2d):
        return F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class Reference:
    """y = A(W / max(1, <u, A_W v> / beta)) x + b in plain PyTorch, u and v the exact ones of a given weight."""

    def __init__(self, model: nn.Module, kind: str, weight: Tensor) -> None:
        self.layer, self.shape = layer_of(model), KINDS[kind].shape
        options = model.modules()
        self.options = next(m.options for m in options if isinstance(m, sn_fast.normalization.parametrization.State))
        n = torch.Size(self.shape).numel()
        eye = torch.eye(n, dtype=weight.dtype).reshape(-1, *self.shape)
        out = apply_layer(self.layer, weight.detach(), None, eye)
        u, _, v = torch.linalg.svd(out.flatten(1).T, full_matrices=False)
        self.u, self.v = u[:, 0].reshape(out.shape[1:]), v[0].reshape(self.shape)

    def __call__(self, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        sigma = (apply_layer(self.layer, weight, None, self.v[None])[0] * self.u).sum()
        ratio = sigma / self.options.beta
        return apply_layer(self.layer, weight / (ratio.clamp(min=1) if self.options.cap else ratio), bias, x)


class Setting:
    """A model in float64, other weights for it, and the loss of both it and the reference, as functions of them."""

    def __init__(self, kind: str, how: str = "model", change: str = "random", **options) -> None:
        self.kind, self.model = kind, made(kind, how, **options).double()
        self.given = weights_of(self.model, change)
        self.names = raw_name(self.model), next(n for n in self.given if n.endswith("bias"))
        self.reference = Reference(self.model, kind, self.given[self.names[0]])
        self.x = KINDS[kind].batch().double()

    def output(self, given: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.model, given, (x,))

    def expected_output(self, given: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.reference(*[given[n] for n in self.names], x)

    def loss(self, given: dict[str, Tensor]) -> Tensor:
        return self.output(given, self.x).tanh().square().sum()

    def expected(self, given: dict[str, Tensor]) -> Tensor:
        return self.expected_output(given, self.x).tanh().square().sum()


def assert_near(found, expected, rel: float = 2e-3) -> None:
    """Trees of tensors, compared by the norm of their difference."""
    found, expected = (torch.utils._pytree.tree_leaves(t) for t in (found, expected))
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach(), b.detach()
        assert float((a - b).norm()) <= rel * float(b.norm()) + 1e-9


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("mode", ["scale", "cap"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_plain_formula(kind: str, mode: str, how: str) -> None:
    s = Setting(kind, how, mode=mode)
    tangent = weights_of(s.model, "random", seed=11)
    with Untouched(s.model.eval(), kind):
        assert_near(grad(s.loss)(s.given), grad(s.expected)(s.given))
        leaves = {n: p.clone().requires_grad_() for n, p in s.given.items()}
        found = torch.autograd.grad(s.loss(leaves), list(leaves.values()))
        assert_near(dict(zip(leaves, found)), grad(s.expected)(s.given))
        assert_near(jvp(s.loss, (s.given,), (tangent,)), jvp(s.expected, (s.given,), (tangent,)))
        out, pull = vjp(lambda p: s.output(p, s.x), s.given)
        other, pull_other = vjp(lambda p: s.expected_output(p, s.x), s.given)
        assert_near((out, pull(torch.ones_like(out))), (other, pull_other(torch.ones_like(out))))
        raw = s.names[0]
        assert_near(
            jacrev(lambda p: s.output(p, s.x[:1]))(s.given)[raw],
            jacrev(lambda p: s.expected_output(p, s.x[:1]))(s.given)[raw],
        )
        # Hessian-vector product, forward over reverse and reverse over reverse.
        hvp, expected = (jvp(grad(f), (s.given,), (tangent,))[1] for f in (s.loss, s.expected))
        assert_near(hvp, expected, rel=1e-2)
        found = torch.autograd.grad(s.loss(leaves), list(leaves.values()), create_graph=True)
        product = sum((g * t).sum() for g, t in zip(found, tangent.values()))
        assert_near(dict(zip(leaves, torch.autograd.grad(product, list(leaves.values())))), expected, rel=1e-2)


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_hessian(kind: str) -> None:
    s = Setting(kind)
    raw = s.names[0]
    small = {raw: s.given[raw]}
    rest = {n: p for n, p in s.given.items() if n != raw}
    found, expected = (hessian(lambda p, f=f: f({**p, **rest}))(small)[raw][raw] for f in (s.loss, s.expected))
    assert_near(found, expected, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_input_jacobian_and_vmap_over_inputs(kind: str) -> None:
    s = Setting(kind)
    with Untouched(s.model, kind):
        assert_near(
            vmap(jacrev(lambda x: s.output(s.given, x[None])[0]))(s.x),
            vmap(jacrev(lambda x: s.expected_output(s.given, x[None])[0]))(s.x),
        )
        assert_near(vmap(lambda x: s.output(s.given, x[None])[0])(s.x), s.expected_output(s.given, s.x))
        # Gradients of each sample.
        per_sample = vmap(grad(lambda p, x: s.output(p, x[None]).square().sum()), (None, 0))(s.given, s.x)
        expected = vmap(grad(lambda p, x: s.expected_output(p, x[None]).square().sum()), (None, 0))(s.given, s.x)
        assert_near(per_sample, expected)
        # The model's own weights, over inputs.
        assert_near(vmap(lambda x: s.model(x[None])[0])(s.x), s.model(s.x).detach(), rel=1e-9)


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ensembles(kind: str, on_meta: bool) -> None:
    """Trained from stacked parameters; every member has norm 1, and its gradient is that of a model alone."""
    models = [made(kind, "model", seed=i) for i in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    if on_meta:
        base = base.to("meta")
    raw = raw_name(models[0])
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(torch.randn_like(p))

    def call(p, b, x):
        return functional_call(base, (p, b), (x,))

    optimizer = torch.optim.Adam(parameters.values(), 0.02)
    for step in range(8):
        x = KINDS[kind].batch(seed=step)
        loss = vmap(call, (0, 0, None))(parameters, buffers, x).tanh().square().sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for i in range(3):
                reference = Reference(models[0], kind, parameters[raw][i])
                leaf = parameters[raw][i].detach().requires_grad_()
                bias = next(p for n, p in parameters.items() if n.endswith("bias"))[i].detach()
                reference(leaf, bias, x).tanh().square().sum().backward()
                assert_near(parameters[raw].grad[i], leaf.grad, rel=1e-2)
        optimizer.step()
    for i in range(3):
        norm = norm_of(lambda x, i=i: vmap(call, (0, 0, None))(parameters, buffers, x)[i], KINDS[kind].shape)
        assert norm == pytest.approx(1.0, rel=6e-3)


@pytest.mark.parametrize("bound_or_full", [{"bound": True}, {"gradient": "full"}])
def test_ensembles_with_options(bound_or_full: dict) -> None:
    models = [made("grouped", "model", seed=i, **bound_or_full) for i in range(2)]
    parameters, buffers = stack_module_state(models)
    parameters = {
        n: p.detach() * torch.tensor([1.0, 7.0]).reshape(-1, *[1] * (p.ndim - 1)) for n, p in parameters.items()
    }

    def call(x):
        return vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)

    for i in range(2):
        norm = norm_of(lambda x, i=i: call(x)[i], KINDS["grouped"].shape)
        assert norm <= 1.0 + 6e-3
        assert norm > 0.5


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_meta_learning(kind: str, first_order: bool) -> None:
    """Inner steps of gradient descent on the model's own parameters; the outer gradient flows through them."""
    model = made(kind, "model").double()
    x, y = KINDS[kind].batch().double(), KINDS[kind].batch(seed=8).double()
    own = {n: p.detach().clone() for n, p in model.named_parameters()}

    def inner(call: Callable, p: dict[str, Tensor]) -> Tensor:
        for _ in range(2):
            leaves = {n: t if t.requires_grad else t.clone().requires_grad_() for n, t in p.items()}
            loss = call(leaves, x).tanh().square().sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=not first_order)
            p = {n: t - 0.05 * g for (n, t), g in zip(leaves.items(), grads)}
        return call(p, y).tanh().square().sum()

    def plain(p: dict[str, Tensor], z: Tensor) -> Tensor:  # vectors of whatever weight comes
        weight, bias = p[raw_name(model)], next(t for n, t in p.items() if n.endswith("bias"))
        return Reference(model, kind, weight)(weight, bias, z)

    results = []
    before = full_state(model)
    for call in (lambda p, z: functional_call(model, p, (z,)), plain):
        leaves = {n: t.clone().requires_grad_() for n, t in own.items()}
        loss = inner(call, leaves)
        results.append((loss.detach(), torch.autograd.grad(loss, list(leaves.values()))))
    assert same_bits(full_state(model), before)
    assert_near(*results, rel=1e-2)


class Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_below_and_on_top(kind: str, below: bool) -> None:
    """Below, the masked weight is normalised; on top, the mask cuts what is normalised already."""
    torch.manual_seed(0)
    layer = KINDS[kind].make()
    mask = (torch.rand_like(layer.weight) > 0.3).float()
    if below:
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    sn_fast.spectral_norm(layer, input_size=KINDS[kind].shape[1:] or None, mode="scale")
    if not below:
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    given = weights_of(layer, "random")
    raw = given[raw_name(layer)]
    own = norm_of(layer, KINDS[kind].shape)
    with Untouched(layer, kind):
        norm = norm_of(lambda x: functional_call(layer, given, (x,)), KINDS[kind].shape)
    if below:
        assert norm == pytest.approx(1.0, rel=6e-3)
        assert own == pytest.approx(1.0, rel=6e-3)
    else:
        assert norm == pytest.approx(raw_norm(raw * mask, kind) / raw_norm(raw, kind), rel=6e-3)
    raw_of(layer).data.copy_(raw)
    assert norm_of(layer, KINDS[kind].shape) == pytest.approx(norm, rel=6e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_dictionaries_and_own_parameters(kind: str) -> None:
    model = made(kind, "model")
    raw = raw_name(model)
    with Untouched(model, kind):
        norm = norm_of(
            lambda x: functional_call(model, {raw: torch.randn_like(raw_of(model))}, (x,)), KINDS[kind].shape
        )
        assert norm == pytest.approx(1.0, rel=6e-3)
        norm = norm_of(lambda x: functional_call(model, dict(model.named_parameters()), (x,)), KINDS[kind].shape)
        assert norm == pytest.approx(1.0, rel=6e-3)
    # What was written to the own weight before counts at its own next use, whatever was called in between.
    raw_of(model).data.normal_()
    functional_call(model, weights_of(model, "scaled"), (KINDS[kind].batch(),))
    assert norm_of(model, KINDS[kind].shape) == pytest.approx(1.0, rel=6e-3)


@pytest.mark.parametrize("parameters", ["own", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_from_outside_keep_nothing_from_the_model(kind: str, parameters: str) -> None:
    """A refresh written into them is lost after the call; the model still follows the change of its weight."""
    for how in HOWS:
        model = made(kind, how)
        x, shape = KINDS[kind].batch(), KINDS[kind].shape
        for write in (False, True):
            if write:
                raw_of(model).data.normal_()
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            given = (dict(model.named_parameters()) if parameters == "own" else {}, buffers)
            norm = norm_of(lambda z, model=model, given=given: functional_call(model, given, (z,)), shape)
            assert norm == pytest.approx(1.0, rel=6e-3)
            assert norm_of(model, shape) == pytest.approx(1.0, rel=6e-3)
        raw_of(model).data.normal_()
        stacked = {name: torch.stack([b, b]) for name, b in model.named_buffers()}
        outputs = vmap(lambda b, model=model, x=x: functional_call(model, b, (x,)))(stacked)
        expected = model(x)
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-3)
        assert norm_of(model, shape) == pytest.approx(1.0, rel=6e-3)


# -- compiled ---------------------------------------------------------------------------------------------------------


def _network(**options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    return sn_fast.apply_spectral_norm(net, torch.randn(1, 2, 4, 4), mode="scale", **options)


def _check_compiled(backend: str) -> None:
    torch._dynamo.reset()
    model, x = _network(), torch.randn(5, 2, 4, 4)
    given = weights_of(model, "random")
    tangent = weights_of(model, "random", seed=9)
    before = full_state(model)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,)).square().sum()

    for function, arguments in ((loss, (given,)), (grad(loss), (given,))):
        assert_near(torch.compile(function, backend=backend)(*arguments), function(*arguments), rel=1e-4)
    if backend == "aot_eager":
        pushed = torch.compile(lambda p, t: jvp(loss, (p,), (t,)), backend=backend)
        assert_near(pushed(given, tangent), jvp(loss, (given,), (tangent,)), rel=1e-4)
        leaves = {n: p.clone().requires_grad_() for n, p in given.items()}
        found = torch.autograd.grad(torch.compile(loss, backend=backend)(leaves), list(leaves.values()))
        assert_near(dict(zip(leaves, found)), grad(loss)(given), rel=1e-4)
    assert same_bits(full_state(model), before)
    if backend == "aot_eager":  # own parameters, buffers from outside
        raw_of(model).data.normal_()
        given = {**dict(model.named_parameters()), **{name: b.clone() for name, b in model.named_buffers()}}
        found = torch.compile(loss, backend=backend)(given)
        assert_near(found, model(x).square().sum(), rel=1e-2)
        assert norm_of(model[0], (2, 4, 4)) == pytest.approx(1.0, rel=6e-3)


def test_compiled_transforms() -> None:
    _check_compiled("aot_eager")


@pytest.mark.slow
def test_compiled_transforms_by_inductor() -> None:
    _check_compiled("inductor")
