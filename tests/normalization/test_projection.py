"""SpectralProjection: plain weights whose layers' true norms are at most beta after every step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sn_fast
from sn_fast import SpectralProjection

from .projection_models import LAYERS, X, dense, loss_of, network, norms, norms_of_matrix, shape_of, train


@pytest.mark.parametrize("kind", LAYERS)
def test_the_norm_is_that_of_the_dense_matrix(kind: str) -> None:
    layer = LAYERS[kind]()
    with torch.no_grad():
        layer.weight *= 5 / torch.linalg.matrix_norm(dense(layer, kind), 2)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    projection = SpectralProjection(layer, torch.randn(1, *shape_of(layer, kind)), beta=0.7, n_power_iterations=30)
    torch.testing.assert_close(torch.linalg.matrix_norm(dense(layer, kind), 2).item(), 0.7, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.weight, before * 0.14, rtol=1e-4, atol=1e-7)
    assert torch.equal(layer.bias, bias)
    torch.testing.assert_close(projection.sigmas(), {"": 0.7}, rtol=1e-4, atol=0)
    with torch.no_grad():
        layer.weight *= 0.5
    small = layer.weight.detach().clone()
    projection.step()
    assert torch.equal(layer.weight, small), "a weight below beta was changed"


@pytest.mark.parametrize("kind", ["linear", "strided", "transposed"])
def test_each_step_is_one_iteration_from_v(kind: str) -> None:
    layer = LAYERS[kind]()
    projection = SpectralProjection(layer, torch.randn(1, *shape_of(layer, kind)), beta=0.1)
    for _ in range(3):
        v = projection.state_dict()[".v"].double().flatten()
        with torch.no_grad():
            layer.weight += 0.05 * torch.randn_like(layer.weight)
        a, raw = dense(layer, kind), layer.weight.detach().clone()
        u = a @ v / torch.linalg.vector_norm(a @ v)
        w = a.T @ u
        sigma = torch.linalg.vector_norm(w)
        projection.step()
        wanted = raw.double() / (sigma / 0.1).clamp(min=1)
        torch.testing.assert_close(layer.weight.detach().double(), wanted, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(projection.state_dict()[".v"].double().flatten(), w / sigma, rtol=1e-4, atol=1e-6)


def test_training_stays_within_beta_and_learns() -> None:
    free, model = network(), network()
    example = X[:1]
    projection = SpectralProjection(model, example, beta={r"^0$": 0.9, ".": 0.6})
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    projection.attach(optimizer)
    first = loss_of(model).item()
    train(model, optimizer, 40)
    train(free, torch.optim.SGD(free.parameters(), 0.05, momentum=0.9), 40)
    for norm, beta, unbounded in zip(norms(model), (0.9, 0.6, 0.6), norms(free)):
        assert norm <= 1.05 * beta
        assert unbounded > 1.2 * beta
    assert loss_of(model).item() < 0.7 * first
    assert projection.sigmas().keys() == {"0", "3", "5"}


def test_a_tolerance_brings_the_norm_to_beta() -> None:
    found = {}
    for tol in (None, 1e-4):
        model = network()
        projection = SpectralProjection(model, X[:1], beta=0.5, tol=tol)
        for _ in range(4):
            with torch.no_grad():
                for layer in (model[0], model[3], model[5]):
                    layer.weight += 0.3 * layer.weight.std() * torch.randn_like(layer.weight)
            projection.step()
        found[tol] = max(norms(model))
    assert found[1e-4] <= 0.5 * 1.005 < found[None]


def test_the_model_stays_plain() -> None:
    model, plain = network(), network()
    projection = SpectralProjection(model, X[:1])
    optimizer = torch.optim.Adam(model.parameters())
    projection.attach(optimizer)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for m in model.modules():
        assert not {**m._forward_hooks, **m._forward_pre_hooks, **m._backward_hooks}
    averaged = torch.optim.swa_utils.AveragedModel(model)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    kept = [[p.detach().clone() for p in m.parameters()] for m in (averaged, *twins)]
    pickle.dumps(optimizer), copy.deepcopy(optimizer)
    train(model, optimizer, 2)
    for m, before in zip((averaged, *twins), kept):
        assert all(map(torch.equal, m.parameters(), before))
    with torch.no_grad():
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), plain(X))


def test_scale_reshape_include_and_exclude() -> None:
    model = network()
    SpectralProjection(model, X[:1], mode="scale", beta=3.0, include=nn.Linear, exclude="^5", n_power_iterations=20)
    conv, first, last = norms(model)
    assert abs(first - 3.0) < 1e-3
    fresh = norms(network())
    assert (conv, last) == (fresh[0], fresh[2])
    transposed = nn.ConvTranspose2d(4, 3, 3)
    SpectralProjection(transposed, torch.zeros(1, 4, 5, 5), operator="reshape", mode="scale", n_power_iterations=40)
    theirs = torch.nn.utils.parametrizations.spectral_norm(copy.deepcopy(transposed), n_power_iterations=100)
    torch.testing.assert_close(transposed.weight, theirs.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4
    projection = SpectralProjection(model, X[:1].to(dtype), beta=0.5, n_power_iterations=20)
    assert all(p.dtype == dtype for p in model.parameters())
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.dtype == wanted for t in projection.state_dict().values())
    rounding = 1e-6 if dtype == torch.float64 else 4e-3
    for norm in norms(model):
        assert abs(norm - 0.5) < 0.5 * rounding


def test_zero_and_broken_weights_stay_as_they_are() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.zero_()
        model[5].weight[0, 0] = torch.inf
    projection = SpectralProjection(model, X[:1], beta=0.1, exclude="^5")
    broken = model[5].weight.detach().clone()
    SpectralProjection(model, X[:1], beta=0.1, include=nn.Linear)
    assert not model[3].weight.any()
    assert torch.equal(model[5].weight, broken)
    with torch.no_grad():
        model[3].weight.normal_()
    for _ in range(60):
        projection.step()
    assert abs(norms_of_matrix(model[3].weight) - 0.1) < 1e-3


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_that_begins_without_a_norm_has_the_right_one_after_its_first_step(kind: str, value: float) -> None:
    layer = LAYERS[kind]()
    filled = layer.weight.detach().clone()
    nn.init.constant_(layer.weight, value)
    projection = SpectralProjection(layer, torch.randn(1, *shape_of(layer, kind)), beta=0.3, mode="scale")
    if kind != "wide":  # there the state goes through a file first
        projection.step()
    else:
        projection.load_state_dict({name: t.clone() for name, t in projection.state_dict().items()})
    with torch.no_grad():
        layer.weight.copy_(filled)
    projection.step()
    torch.testing.assert_close(torch.linalg.matrix_norm(dense(layer, kind), 2).item(), 0.3, rtol=1e-3, atol=0)
    v = projection.state_dict()[".v"].clone()
    with torch.no_grad():
        layer.weight += 0.01 * torch.randn_like(layer.weight)
    projection.step()  # from here on an iteration per step, from v
    assert not torch.equal(projection.state_dict()[".v"], v)


def test_tied_weights_are_scaled_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight *= 8 / torch.linalg.matrix_norm(model[0].weight, 2)
    projection = SpectralProjection(model, torch.zeros(1, 6), mode="scale", beta=2.0, n_power_iterations=50)
    assert abs(norms_of_matrix(model[0].weight) - 2.0) < 1e-3
    assert projection.sigmas().keys() == {"0"}
    convolutions = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2))
    convolutions[1].weight = convolutions[0].weight
    with pytest.raises(ValueError, match=r"layers '0' and '1' share one weight, but not their convolution"):
        SpectralProjection(convolutions, torch.zeros(1, 3, 8, 8))
    # As matrices one is 3 x 45, the other 5 x 27.
    convolutions = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ConvTranspose2d(5, 3, 3, padding=1))
    convolutions[1].weight = convolutions[0].weight
    with pytest.raises(ValueError, match=r"layers '0' and '1' share one weight, but not their convolution"):
        SpectralProjection(convolutions, torch.zeros(1, 3, 8, 8), operator="reshape")


# -- what is refused --------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return self._conv_forward(x, (w - w.mean()) / w.std(), self.bias)


def test_weights_that_are_not_plain_are_refused() -> None:
    for change, words in (
        (lambda m: nn.utils.parametrizations.orthogonal(m[3]), "layer '3': Linear.weight is already parametrized by"),
        (lambda m: sn_fast.spectral_norm(m[3]), r"remove that first, with sn_fast\.remove_spectral_norm"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[3]), "already parametrized by"),
        (lambda m: nn.utils.prune.l1_unstructured(m[3], "weight", 0.5), "layer '3': .*no parameter|pruned"),
        (lambda m: m.__setitem__(0, Standardised(3, 8, 3, stride=2, padding=1)), "layer '0' cannot be normalised"),
    ):
        model = network()
        change(model)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=words):
            SpectralProjection(model, X[:1])
        assert all(map(torch.equal, model.parameters(), before))
        SpectralProjection(model, X[:1], exclude="[03]")


def test_arguments_out_of_range_are_named() -> None:
    for arguments, words in (
        ({"beta": 0.0}, "beta=0.0 must be > 0"),
        ({"beta": {"x": 1.0}}, "pattern 'x' matches no layer"),
        ({"mode": "clip"}, "mode='clip' is unknown"),
        ({"tol": 2.0}, "tol=2.0 must be a number between 0 and 1"),
        ({"n_power_iterations": 0}, "n_power_iterations=0 must be an integer >= 1"),
        ({"exclude": "."}, "no layer to normalise"),
        ({"cap_singular_values": True, "mode": "scale"}, "cap_singular_values=True caps, and mode='scale' does not"),
        ({"operator": "fft"}, "operator='fft' is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            SpectralProjection(network(), X[:1], **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is a shape; give a tensor"):
        SpectralProjection(network(), (1, 3, 8, 8))
    unused = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(1, 1, 3)})
    unused.forward = lambda x: unused["a"](x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="does not use layer 'b' on example_input"):
        SpectralProjection(unused, torch.zeros(1, 4))


# -- compiled and captured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_step_in_compiled_code_is_the_same(tol: float | None) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        projection = SpectralProjection(model, X[:1], beta=0.5, tol=tol)

        def step(projection: SpectralProjection = projection, model: nn.Module = model) -> None:
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.3 * p.grad
            projection.step()

        counted = CompileCounterWithBackend("aot_eager")
        run = torch.compile(step, fullgraph=True, backend=counted) if compiled else step
        for _ in range(4):
            model.zero_grad(set_to_none=False)
            loss_of(model).backward()
            run()
        assert counted.frame_count == int(compiled)
        results.append([*model.parameters(), *projection.state_dict().values()])
    assert all(map(torch.equal, *results))


def test_the_operator_is_sound() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5)
    members = projection._members
    arguments = (
        [m.weight().detach().clone() for m in members],
        *([getattr(m, name).clone() for m in members] for name in ("u", "v", "sigma")),
        [m.rows for m in members],
        [c for m in members for c in m.code],
        [0.2] * 3,
        [True] * 3,
        1,
    )
    torch.library.opcheck(torch.ops.sn_fast.project_weights.default, arguments)
