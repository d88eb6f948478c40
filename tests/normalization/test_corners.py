"""Corners that a review found: autocast, replaced weights, tied weights, odd copies, odd checkpoints."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, vector_to_parameters

import sn_fast
from sn_fast import (
    ConvOperator,
    MatrixOperator,
    apply_spectral_norm,
    frozen_sigma,
    operator_norm,
    operator_of,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)
from sn_fast.normalization import registration
from sn_fast.ops import refresh

from ..on_device import DEVICE

X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(5))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(96, 3),
    )


def normalised(**options) -> nn.Sequential:
    return apply_spectral_norm(network(), X[:1], beta=0.3, **options)


def norms(model: nn.Module) -> list[float]:
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [float(operator_norm(operator_of(m), method="dense")) for m in layers]


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# -- precision ------------------------------------------------------------------------------------------------------


def test_state_and_norms_keep_their_precision_under_autocast() -> None:
    op = ConvOperator(torch.randn(8, 8, 3, 3), (8, 8), padding=1)
    plain = operator_norm(op)
    model, twin = normalised(), normalised()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(model.parameters(), twin.parameters()):
            a.mul_(1.5)
            b.mul_(1.5)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(operator_norm(op), plain)
        model(X)
        update_spectral_norm(model)
        started = sn_fast.spectral_norm(nn.Linear(5, 4))
    twin(X)
    update_spectral_norm(twin)
    assert same(buffers(model), buffers(twin))
    assert norms(started) == pytest.approx([1.0 if sigmas(started)[""] > 1 else sigmas(started)[""]], rel=1e-3)


def test_the_full_gradient_keeps_its_precision_under_autocast() -> None:
    layer = spectral_norm(nn.Linear(6, 5), beta=0.1, gradient="full")
    layer.weight.square().sum().backward()
    raw = layer.parametrizations.weight.original
    plain, raw.grad = raw.grad, None
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = layer.weight.square().sum()
    loss.backward()
    assert torch.equal(raw.grad, plain)


# -- what is a change of weight -------------------------------------------------------------------------------------


def test_a_replaced_weight_is_a_change() -> None:
    layer = copy.deepcopy(spectral_norm(nn.Linear(5, 5)))
    for _ in range(3):
        layer.parametrizations.weight.original = nn.Parameter(torch.randn(5, 5) * 10)
        layer(torch.randn(1, 5))
        update_spectral_norm(layer, 100)
        assert norms(layer) == pytest.approx([1.0], rel=1e-3)


def test_replaced_data_is_a_change() -> None:
    for write in (
        lambda m: vector_to_parameters(2 * nn.utils.parameters_to_vector(m.parameters()), m.parameters()),
        lambda m: [setattr(p, "data", 2 * p.data) for p in m.parameters()],
    ):
        model = normalised()
        with torch.no_grad():
            write(model)
        model(X)
        assert norms(model) == pytest.approx([0.3] * 3, rel=5e-3)


def test_loading_by_assignment_of_other_weights_starts_afresh() -> None:
    model = copy.deepcopy(normalised())
    other = {k: v * 5 for k, v in model.state_dict().items() if k.endswith("original")}
    model.load_state_dict(other, strict=False, assign=True)
    model(X)
    assert norms(model) == pytest.approx([0.3] * 3, rel=5e-3)


def test_loading_by_assignment_keeps_the_state() -> None:
    model, twin = normalised(), normalised()
    twin.load_state_dict(model.state_dict(), assign=True)
    before = buffers(model)
    twin(X)
    assert same(buffers(twin), before)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    twin.load_state_dict(half, assign=True)
    assert twin[0].parametrizations.weight[0].sigma.dtype == torch.float32


def tied() -> nn.Sequential:
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    b.weight = a.weight
    return apply_spectral_norm(nn.Sequential(a, nn.ReLU(), b), torch.randn(1, 5), beta=0.5)


def test_tied_weights() -> None:
    model, twin = tied(), tied()
    before = buffers(model)
    model(torch.randn(1, 5))
    assert same(buffers(model), before)
    twin.load_state_dict(model.state_dict())
    twin(torch.randn(1, 5))
    assert same(buffers(twin), before)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.randn(1, 5)).sum().backward()
    optimizer.step()
    model(torch.randn(1, 5))
    assert not same(buffers(model), before)
    assert torch.equal(model[0].parametrizations.weight[0].sigma, model[2].parametrizations.weight[0].sigma)


# -- torch.func, sparse gradients, memory formats -------------------------------------------------------------------


def test_torch_func() -> None:
    model = normalised()
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, X)
    for i, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.func.vmap(model)(X[:, None])[:, 0], model(X), rtol=1e-5, atol=1e-6)
    _, tangent = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    torch.testing.assert_close(tangent, (model(X + 1e-3) - model(X - 1e-3)) / 2e-3, rtol=1e-2, atol=1e-3)


def test_sparse_embedding() -> None:
    embedding = spectral_norm(nn.Embedding(10, 4, sparse=True), beta=0.1)
    embedding(torch.tensor([1, 2])).square().sum().backward()
    assert torch.isfinite(embedding.parametrizations.weight.original.grad).all()


@pytest.mark.parametrize("format_", [torch.channels_last, torch.channels_last_3d])
def test_memory_formats(format_: torch.memory_format) -> None:
    n = 2 if format_ == torch.channels_last else 3
    layer = (nn.Conv2d if n == 2 else nn.Conv3d)(2, 4, 3, padding=1)
    spectral_norm(layer, input_size=(5,) * n)
    sigma = sigmas(layer)
    layer.to(memory_format=format_)
    assert sigmas(layer) == pytest.approx(sigma)
    layer(torch.randn(1, 2, *(5,) * n)).sum().backward()


# -- copies and removal ---------------------------------------------------------------------------------------------


def test_a_copy_made_inside_frozen_sigma_is_not_frozen() -> None:
    model = normalised()
    with frozen_sigma(model):
        twin = copy.deepcopy(model)
    assert twin[0].weight.requires_grad
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3)
    twin(X)
    assert norms(twin) == pytest.approx([0.3] * 3, rel=5e-3)


def test_frozen_layers_of_unknown_size_and_partial_and_overlapping_contexts() -> None:
    lazy = spectral_norm(nn.Conv2d(2, 3, 3))
    with frozen_sigma(lazy):
        lazy(X)
        assert not lazy.weight.requires_grad
    assert lazy.weight.requires_grad

    model = normalised()
    before = buffers(model[0])
    with frozen_sigma(model[0]):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        model(X)
        assert same(buffers(model[0]), before)
    model(X)
    assert norms(model) == pytest.approx([0.3] * 3, rel=5e-3)

    first, second = frozen_sigma(model), frozen_sigma(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model[0].weight.requires_grad
    second.__exit__(None, None, None)
    assert model[0].weight.requires_grad


def test_torchs_own_removal_leaves_a_working_layer() -> None:
    model = normalised()
    removed = model[0].parametrizations.weight[0]
    parametrize.remove_parametrizations(model[0], "weight")
    before = buffers(removed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model(X).sum().backward()
    assert list(sigmas(model)) == ["2", "4"]
    update_spectral_norm(model)
    assert same(buffers(removed), before)


def test_a_replaced_layer_is_not_kept_alive() -> None:
    model = normalised()
    head = weakref.ref(model[4])
    model[4] = nn.Linear(96, 3)
    gc.collect()
    assert head() is None
    model(X)
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None


@pytest.mark.parametrize(("place", "name", "good"), [(refresh, "lanczos_start", 0), (registration, "share_class", 1)])
def test_a_failing_start_leaves_the_layer_as_it_was(place, name: str, good: int, monkeypatch) -> None:
    real, calls = getattr(place, name), []

    def fails(*args: object) -> object:
        calls.append(args)
        if len(calls) > good:
            raise RuntimeError("out of memory")
        return real(*args)

    model = network()
    expected = model(X)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            apply_spectral_norm(model, X[:1], beta=0.1)
        calls.clear()
        for _ in range(good):
            remove_spectral_norm(spectral_norm(model[4]))
        with pytest.raises(RuntimeError, match="out of memory"):
            spectral_norm(model[4])
    assert all(type(m).__name__ in ("Conv2d", "ReLU", "Flatten", "Linear") for m in model)
    assert torch.equal(model(X), expected)


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "wanted"), [("detached", "full"), ("full", "detached")])
def test_a_checkpoint_of_the_other_gradient(stored: str, wanted: str) -> None:
    saved, model = normalised(gradient=stored), normalised(gradient=wanted)
    with torch.no_grad():
        for p in saved.parameters():
            p.copy_(torch.randn_like(p))
    update_spectral_norm(saved, 300)
    model.load_state_dict(saved.state_dict(), strict=True)
    model(X).sum().backward()
    assert norms(model) == pytest.approx([0.3] * 3, rel=5e-3)


def test_full_gradient_after_a_refresh_in_inference_mode() -> None:
    model = normalised(gradient="full")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with torch.inference_mode():
        model(X)
    model(X).sum().backward()


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda **o: spectral_norm(nn.Conv2d(2, 3, 3, dilation=2), **o), (5, 5)),
        (lambda **o: spectral_norm(nn.Conv2d(2, 3, 5, stride=2), **o), (6, 6)),
        (lambda **o: spectral_norm(nn.Conv2d(2, 3, 2, stride=2), **o), (6, 8)),
        (lambda **o: spectral_norm(nn.Conv2d(2, 3, 3, stride=3, padding=1), **o), (9, 6)),
        (lambda **o: spectral_norm(nn.Conv2d(2, 4, (1, 3), groups=2), **o), (6, 8)),
        (lambda **o: spectral_norm(nn.ConvTranspose2d(2, 3, 2, stride=2), **o), (3, 4)),
        (lambda **o: spectral_norm(nn.Conv2d(2, 3, 1), reduce=False, **o), (6, 8)),
    ],
)
@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_layers_of_unknown_size_load_every_checkpoint(make, size, gradient: str) -> None:
    known, lazy = make(input_size=size, gradient=gradient), make(gradient=gradient)
    lazy.load_state_dict(known.state_dict(), strict=True)
    before = buffers(known)
    assert same(buffers(lazy), before)
    x = torch.randn(1, 2, *size)
    assert torch.equal(lazy(x), known(x))
    assert same(buffers(lazy), before)


def test_layers_of_unknown_size_ignore_vectors_that_do_not_fit() -> None:
    for other in (
        spectral_norm(nn.Conv2d(2, 3, 3), operator="reshape"),
        spectral_norm(nn.Conv2d(2, 3, 3, stride=2), input_size=(8, 8)),
    ):
        lazy = spectral_norm(nn.Conv2d(2, 3, 3), beta=0.1)
        lazy.load_state_dict(other.state_dict(), strict=True)
        lazy(X)
        assert norms(lazy) == pytest.approx([0.1], rel=5e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_state_saved_before_the_first_forward_loads_after_it(groups: int) -> None:
    layer = spectral_norm(nn.Conv2d(2, 4, 3, groups=groups), beta=0.1)
    saved = copy.deepcopy(layer.state_dict())
    layer(X)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    layer(X)
    layer.load_state_dict(saved, strict=True)
    layer(X)
    assert norms(layer) == pytest.approx([0.1], rel=5e-3)


# -- sizes, extremes, arguments -------------------------------------------------------------------------------------


def test_no_false_warning_where_one_window_is_the_whole_input(recwarn: pytest.WarningsRecorder) -> None:
    for layer, size in ((nn.Conv2d(2, 3, 5, stride=2), (6, 6)), (nn.Conv2d(2, 3, 3, dilation=2), (5, 5))):
        for given in (size, None):
            normalised_layer = spectral_norm(copy.deepcopy(layer), input_size=given)
            normalised_layer(torch.randn(1, 2, *size))
    assert not recwarn.list


def test_operator_of_a_reduced_layer_is_the_layers_own_map() -> None:
    layer = spectral_norm(nn.Conv2d(3, 5, 1, bias=False), input_size=(8, 8))
    op = operator_of(layer)
    assert op.in_shape == (3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(op.matvec(x), layer(x))


def test_an_operator_that_reads_only_padding_is_zero() -> None:
    op = ConvOperator(torch.randn(1, 1, 1), 1, stride=10, padding=[(8, 0)])
    assert not op.to_dense().any()
    assert operator_norm(op) == 0
    assert op.rmatvec(torch.randn(op.out_shape)).shape == op.in_shape


def test_a_zero_group_beside_others_keeps_a_unit_pair() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=2)
    with torch.no_grad():
        layer.weight[:2] = 0
    p = spectral_norm(layer, input_size=(5, 5)).parametrizations.weight[0]
    for vector in (p.u, p.v):
        torch.testing.assert_close(vector.reshape(2, -1).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("shape", [(2, 20000), (20000, 2)])
def test_dense_takes_the_shorter_side(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    expected = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(operator_norm(MatrixOperator(weight), method="dense"), expected, rtol=1e-5, atol=0)


def test_numpy_integers_are_integers() -> None:
    eight = np.int64(8)
    op = ConvOperator(torch.randn(2, 2, 3, 3), (eight, eight), stride=np.int64(2), padding=np.int64(1))
    assert op.out_shape == (2, 4, 4)
    assert ConvOperator(torch.randn(2, 2, 3, 3), eight).in_shape == (2, 8, 8)
    spectral_norm(nn.Linear(2, 2), n_power_iterations=np.int64(2), beta=np.float32(0.5))


W = torch.randn(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ConvOperator(W, None), "input_size=None"),
        (lambda: ConvOperator(W, 8.0), "input_size=8.0"),
        (lambda: ConvOperator(W, 8, padding=None), "padding=None"),
        (lambda: ConvOperator(W, 8, padding=1.5), "padding=1.5"),
        (lambda: ConvOperator(W, 8, groups="2"), "groups='2'"),
        (lambda: ConvOperator(W, 8, groups=2.0), "groups=2.0"),
        (lambda: spectral_norm(nn.Linear(2, 2), beta=None), "beta=None"),
        (lambda: spectral_norm(nn.Linear(2, 2), beta="1"), "beta='1'"),
        (lambda: operator_norm(W), "op is a Tensor"),
        (lambda: operator_norm(MatrixOperator(W[0, 0]), tol="a"), "tol='a'"),
        (lambda: operator_norm(MatrixOperator(W[0, 0]), max_iterations=2.5), "max_iterations=2.5"),
        (lambda: apply_spectral_norm(network(), [X]), "example_input is a list"),
        (lambda: apply_spectral_norm(network(), X, include="Linear"), "include='Linear'"),
        (lambda: apply_spectral_norm(network(), X, exclude="("), "exclude: '('"),
        (lambda: apply_spectral_norm(network(), X, beta={"(": 1.0}), "beta: '('"),
    ],
)
def test_bad_input_names_the_argument(call, says: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert says in str(error.value)
