"""What PyTorch tests of its spectral_norm (test/nn/test_parametrization.py), for the same normalisation by sn_fast.

``mode="scale", operator="reshape"`` divides by the norm of the matrix that PyTorch takes. Each test runs with and
without ``torch.__future__.set_swap_module_params_on_conversion``, most also on top of another parametrization (a mask)
and below one. Where the two differ, sn_fast's rule is what is tested: the state moves when the weight's content has
changed, then once, in train and in eval; it starts from Lanczos steps, not from power iterations.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

from sn_fast import frozen_sigma, remove_spectral_norm, sigmas

from .torch_cases import (  # noqa: F401 - swap is a fixture of every test
    PLACES,
    Mask,
    assert_true,
    buffers,
    matrix,
    normalised,
    same,
    spectral_norm,
    state_of,
    swap,
    trained,
    truth,
)

# -- what is registered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_buffers_parameters_and_attributes(place: str) -> None:
    layer = normalised(nn.Linear(5, 7), place)
    state, chain = state_of(layer), layer.parametrizations.weight
    assert {name: tuple(b.shape) for name, b in state.named_buffers()} == {"u": (7,), "v": (5,), "sigma": ()}
    assert not list(state.parameters())
    assert list(chain._parameters) == ["original"]
    assert {name for name, _ in layer.named_parameters()} == {"bias", "parametrizations.weight.original"}
    assert "weight" not in layer._parameters
    assert "weight" not in layer._buffers
    assert (layer.weight.shape, layer.weight.stride()) == (chain.original.shape, chain.original.stride())
    assert parametrize.type_before_parametrizations(layer) is nn.Linear
    assert_true(layer, place)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_the_weight_needs_a_gradient_as_it_did_before(place: str, trainable: bool) -> None:
    layer = nn.Linear(5, 7)
    layer.weight.requires_grad_(trainable)
    normalised(layer, place)
    assert layer.parametrizations.weight.original.requires_grad is trainable
    assert layer.weight.requires_grad is trainable
    layer.parametrizations.weight.original.requires_grad_(not trainable)
    assert layer.weight.requires_grad is not trainable


def test_the_parametrization_is_in_the_modules_mode() -> None:
    layer = spectral_norm(nn.Linear(3, 4).eval())
    assert not state_of(layer).training
    assert state_of(layer.train()).training


@pytest.mark.parametrize("double", [False, True])
def test_value_of_a_diagonal_weight(double: bool) -> None:
    diagonal = torch.tensor([0.3, -2.5, 1.0, 0.0], dtype=torch.float64 if double else torch.float32)
    layer = nn.Linear(4, 4, dtype=diagonal.dtype)
    with torch.no_grad():
        layer.weight = nn.Parameter(torch.diag(diagonal))
    spectral_norm(layer)
    torch.testing.assert_close(layer.weight.detach(), torch.diag(diagonal / 2.5))
    assert sigmas(layer)[""] == pytest.approx(2.5, rel=1e-6)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (5, 6), stride=2), (2, 3, 10, 12)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 3, padding=1), (2, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 8, 8)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 5), (2, 3, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), (2, 3, 10, 12)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 5, 3), (2, 2, 4, 4, 4)),
    "grouped_transpose": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 8, 8)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_those_of_torch(name: str, place: str) -> None:
    make, shape = LAYERS[name]
    layer = normalised(make(), place)
    reference = theirs.spectral_norm(make()).parametrizations.weight[0]
    assert (state_of(layer).u.shape, state_of(layer).v.shape) == (reference._u.shape, reference._v.shape)
    assert_true(layer, place)
    layer(torch.randn(shape)).sum().backward()
    trained(layer, torch.randn(shape), 2, lr=1e-3)
    layer(torch.randn(shape))
    assert_true(layer, place, rtol=2e-2)


def test_a_bilinear_weight_and_an_embedding_have_torchs_rows() -> None:
    for layer in (nn.Bilinear(3, 4, 5), nn.Embedding(6, 3)):
        reference = theirs.spectral_norm(copy.deepcopy(layer)).parametrizations.weight[0]
        spectral_norm(layer)
        assert (state_of(layer).u.shape, state_of(layer).v.shape) == (reference._u.shape, reference._v.shape)
        assert_true(layer)


# -- forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("place", ["alone", "on top of a mask"])
def test_forward_after_a_change_is_n_iterations_from_the_stored_vector(place: str, n: int) -> None:
    layer, x = normalised(nn.Linear(5, 7, dtype=torch.float64), place, n_power_iterations=n), torch.randn(3, 5).double()
    u = state_of(layer).u.clone()
    with torch.no_grad():
        original = layer.parametrizations.weight.original
        original.data += 0.05 * torch.randn(7, 5)  # no new version: the content decides
    weight = (Mask(original)(original) if place != "alone" else original).detach()
    for _ in range(n):
        v = nn.functional.normalize(weight.T @ u, dim=0)
        sigma = (weight @ v).norm()
        u = weight @ v / sigma
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight / sigma, layer.bias))
    for name, expected in (("u", u), ("v", v), ("sigma", sigma)):
        torch.testing.assert_close(getattr(state_of(layer), name), expected)


@pytest.mark.parametrize("n", [0, -1, 1.5, "two"])
def test_a_number_of_iterations_is_a_positive_integer(n: object) -> None:
    with pytest.raises((ValueError, TypeError), match=f"n_power_iterations={n!r}"):
        spectral_norm(nn.Linear(3, 4), n_power_iterations=n)


def test_training_ends_at_the_same_network_as_torch_at_a_fixed_point() -> None:
    layer = nn.Linear(6, 4, dtype=torch.float64)
    reference, x = theirs.spectral_norm(copy.deepcopy(layer), n_power_iterations=60), torch.randn(8, 6).double()
    spectral_norm(layer, n_power_iterations=60)
    for module in (layer, reference):
        trained(module, x, 5, lr=0.01)
    reference(x)  # theirs moves in train mode only
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_training(place: str, trainable: bool) -> None:
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    layer.weight.requires_grad_(trainable)
    normalised(layer, place)
    before = buffers(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    assert same(buffers(layer), before)  # a forward and a backward are no change
    optimizer.step()
    out = layer(x)
    after = buffers(layer)
    assert all(torch.equal(a, b) is not trainable for a, b in zip(before, after, strict=True))
    if trainable:
        (gradient,) = torch.autograd.grad(out.sum(), layer.parametrizations.weight.original)
        assert gradient.norm() > 0
    else:
        assert layer.parametrizations.weight.original.grad is None
    layer(x)
    assert same(buffers(layer), after)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_several_forwards_before_one_backward_in_both_modes(place: str, trainable: bool) -> None:
    layer = nn.Linear(3, 4, dtype=torch.float64)
    layer.weight.requires_grad_(trainable)
    normalised(layer, place)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.01)
    layer(x)
    before = buffers(layer)

    def forwards(x: Tensor) -> Tensor:  # the vectors are not reset in between: they stay as they are
        return sum(layer.train(training)(x) for training in (True, True, False, True, False))

    forwards(x).sum().backward()
    assert gradcheck(forwards, (x,), check_forward_ad=True)
    assert same(buffers(layer), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_slopes_with_regard_to_the_raw_weight(place: str, training: bool) -> None:
    """The numerical slope perturbs the weight in place, and sigma follows it; at converged vectors so does theirs."""
    layer, x = normalised(nn.Linear(2, 3, dtype=torch.float64), place).train(training), torch.randn(2, 2).double()
    original = layer.parametrizations.weight.original
    assert gradcheck(lambda _: layer(x), (original,))
    # The same from outside: a weight that is not the module's own has its own sigma, and moves no state.
    key = "parametrizations.weight.original"
    outside = original.detach().clone().requires_grad_()
    layer(x)
    before = buffers(layer)
    assert gradcheck(lambda w: functional_call(layer, {key: w}, (x,)), (outside,))
    assert same(buffers(layer), before)


@pytest.mark.parametrize("place", PLACES)
def test_eval_equals_the_last_training_forward_and_follows_a_change_too(place: str) -> None:
    layer, x = normalised(nn.Linear(3, 4), place), torch.randn(2, 3)
    trained(layer, x, 3)
    out = layer(x).detach()
    before = buffers(layer)
    layer.eval()
    for _ in range(3):
        assert torch.equal(layer(x), out)
    assert same(buffers(layer), before)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(4, 3))
    layer(x)
    assert_true(layer, place)  # replaced, so it started anew


@pytest.mark.parametrize("place", PLACES)
def test_within_cached_and_frozen_there_is_one_weight(place: str) -> None:
    layer, x = normalised(nn.Linear(3, 4), place), torch.randn(2, 3)
    with parametrize.cached():
        assert layer.weight is layer.weight
        out = layer(x)
    torch.testing.assert_close(layer(x), out)
    with frozen_sigma(layer):
        assert torch.equal(layer(x), out)


# -- several parametrizations, removal --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_second_registration_is_refused_and_changes_nothing(place: str) -> None:
    layer = normalised(nn.Linear(3, 4), place)
    before, keys = buffers(layer), list(layer.state_dict())
    with pytest.raises(ValueError, match=r"weight is already parametrized by .*SpectralNorm.*; remove that first"):
        spectral_norm(layer)
    assert same(buffers(layer), before)
    assert list(layer.state_dict()) == keys
    assert_true(layer, place)


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        (torch.nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm"),
        (torch.nn.utils.weight_norm, "torch.nn.utils.remove_weight_norm"),
        (lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5), "torch.nn.utils.prune.remove"),
        (theirs.spectral_norm, "remove that first, with torch.nn.utils.parametrize"),
    ],
    ids=["old spectral_norm", "old weight_norm", "pruned", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_made_otherwise_already_is_refused_with_the_remedy(method, remedy: str) -> None:
    layer = method(nn.Linear(3, 4))
    before = list(layer.state_dict())
    with pytest.raises(ValueError, match=remedy):
        spectral_norm(layer)
    assert list(layer.state_dict()) == before
    layer(torch.randn(2, 3))


def test_several_weights_of_one_module() -> None:
    cell, x = nn.GRUCell(3, 4), torch.randn(2, 3)
    raw = {name: getattr(cell, name).detach().clone() for name in ("weight_ih", "weight_hh")}
    for name in raw:
        spectral_norm(cell, name)
    trained(cell, x, 3, lr=1e-3)
    cell(x)
    for name in raw:
        assert_true(cell, name=name, rtol=1e-2)
    parametrize.remove_parametrizations(cell, "weight_hh")
    assert "weight_hh" in cell._parameters
    assert "weight_ih" not in cell._parameters
    before = buffers(cell, "weight_ih")
    trained(cell, x, 1)
    cell(x)
    assert not same(before, buffers(cell, "weight_ih"))
    remove_spectral_norm(cell)
    assert not parametrize.is_parametrized(cell)
    assert set(raw) <= set(cell._parameters)


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_removal_keeps_the_output_and_the_layer_can_be_normalised_again(training: bool, by_torch: bool) -> None:
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    parameter, modules = layer.weight, type(layer)
    for _ in range(2):
        spectral_norm(layer).train(training)
        trained(layer, x, 3)
        for _ in range(3):
            out = layer(x).detach()
        if by_torch:
            parametrize.remove_parametrizations(layer, "weight")
        else:
            remove_spectral_norm(layer)
        torch.testing.assert_close(layer(x).detach(), out)
        assert not parametrize.is_parametrized(layer)
        assert not hasattr(layer, "parametrizations")
        assert layer._parameters["weight"] is parameter
        assert isinstance(layer, modules)
        assert set(layer.state_dict()) == {"weight", "bias"}
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_removal_of_all_parametrizations_by_torch(place: str, leave: bool) -> None:
    layer, x = normalised(nn.Linear(3, 4), place), torch.randn(2, 3)
    trained(layer, x, 2)
    out, raw = layer(x).detach(), layer.parametrizations.weight.original.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    if leave:
        torch.testing.assert_close(layer(x).detach(), out)
    else:
        assert torch.equal(layer.weight, raw)
    normalised(layer, place)
    assert_true(layer, place)


@pytest.mark.parametrize("place", PLACES[1:])
def test_removal_beside_other_parametrizations_names_the_way(place: str) -> None:
    layer = normalised(nn.Linear(3, 4), place)
    with pytest.raises(ValueError, match=r"other parametrizations too.*remove_parametrizations\(module, 'weight'\)"):
        remove_spectral_norm(layer)
    assert_true(layer, place)


def test_a_removal_with_a_change_pending_takes_the_new_weight() -> None:
    layer = spectral_norm(nn.Linear(3, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(4, 3))
    expected = truth(layer)
    remove_spectral_norm(layer)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_parametrizations_handed_to_another_module_normalise_whatever_it_holds() -> None:
    layer, other = spectral_norm(nn.Linear(3, 4)), nn.Linear(3, 4)
    parametrize.transfer_parametrizations_and_params(layer, other)
    assert torch.equal(layer.weight, other.weight)
    other.parametrizations.weight.original = nn.Parameter(torch.randn(4, 3))
    before = buffers(layer)
    assert_true(other)
    assert_true(layer)
    assert same(buffers(layer), before)
