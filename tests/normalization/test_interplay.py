"""Weights that hooks put in place within a forward, first forwards inside transforms, inference mode, tied weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sn_fast import apply_spectral_norm, remove_spectral_norm, sigmas, spectral_norm
from sn_fast.normalization.recompute import keep_no_copies

from .test_hunt import norm_of


def large(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(8)
    return module


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return apply_spectral_norm(large(model), torch.randn(1, 8))


def norm_of_convolution(weight: Tensor, n: int) -> float:
    columns = torch.eye(weight.shape[1] * n * n, dtype=torch.float64).reshape(-1, weight.shape[1], n, n)
    return norm_of(F.conv2d(columns, weight.detach().double(), padding=1).flatten(1))


# -- another weight between the model's check and the layer's use ------------------------------------------------------


def _another_parameter(layer: nn.Linear, new: Tensor) -> None:
    holder = layer.parametrizations.weight
    parameter = nn.Parameter(new.clone())
    for _ in range(holder.original._version - parameter._version):  # the count of writes tells nothing
        parameter.data = parameter.data
        torch.autograd.graph.increment_version(parameter)
    assert parameter._version == holder.original._version
    holder.original = parameter


def _other_data(layer: nn.Linear, new: Tensor) -> None:
    layer.parametrizations.weight.original.data = new.clone()


def _written(layer: nn.Linear, new: Tensor) -> None:
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(new)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("put", [_another_parameter, _other_data, _written])
def test_a_hook_puts_another_weight_in_place_within_the_forward(
    put: Callable[[nn.Linear, Tensor], None], grad: bool
) -> None:
    model, x = two_layers(), torch.randn(3, 8)
    new = 10 * torch.randn(8, 8)
    model[2].register_forward_pre_hook(lambda layer, args: put(layer, new))
    with torch.set_grad_enabled(grad):
        y = model(x)
    hidden = torch.relu(model[0](x))
    torch.testing.assert_close(y, F.linear(hidden, new / norm_of(new), model[2].bias), rtol=1e-4, atol=1e-4)


# -- the first forward of a convolution of unknown size ----------------------------------------------------------------


def _plainly(layer: nn.Module, given: dict[str, Tensor], x: Tensor) -> None:
    functional_call(layer, given, (x,))


def _in_a_gradient(layer: nn.Module, given: dict[str, Tensor], x: Tensor) -> None:
    torch.func.grad(lambda p: functional_call(layer, p, (x,)).square().sum())(given)


def _in_a_jvp(layer: nn.Module, given: dict[str, Tensor], x: Tensor) -> None:
    tangents = {name: torch.randn_like(t) for name, t in given.items()}
    torch.func.jvp(lambda p: functional_call(layer, p, (x,)), (given,), (tangents,))


def _in_vmap(layer: nn.Module, given: dict[str, Tensor], x: Tensor) -> None:
    stacked = {name: torch.stack([t, 2 * t]) for name, t in given.items()}
    torch.func.vmap(lambda p: functional_call(layer, p, (x,)))(stacked)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("use", [_plainly, _in_a_gradient, _in_a_jvp, _in_vmap])
def test_the_first_forward_may_be_a_functional_one(use: Callable[..., None], factor: int, buffers: bool) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(large(nn.Conv2d(2, 3, 3, padding=1)))
    x = torch.randn(2, 2, 6, 6)
    given = {name: p if factor == 1 else factor * p.detach() for name, p in layer.named_parameters()}
    if buffers and use is _plainly:
        given.update(layer.named_buffers())
    raw = layer.parametrizations.weight.original
    use(layer, given, x)
    assert sigmas(layer)[""] == pytest.approx(norm_of_convolution(raw, 6), rel=5e-3)
    layer(x).square().mean().backward()
    assert norm_of_convolution(layer.weight, 6) == pytest.approx(1, rel=5e-3)
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_the_first_forward_of_another_weight_normalises_that_one() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(large(nn.Conv2d(2, 3, 3, padding=1, bias=False)))
    x, weight = torch.randn(2, 2, 6, 6), torch.randn(3, 2, 3, 3)
    y = functional_call(layer, {"parametrizations.weight.original": weight}, (x,))
    torch.testing.assert_close(y, F.conv2d(x, weight / norm_of_convolution(weight, 6), padding=1), rtol=1e-3, atol=1e-3)


# -- inference mode ----------------------------------------------------------------------------------------------------


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _converted(model: nn.Module) -> nn.Module:
    return model.double().float()


def _loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return model


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("change", [_copied, _converted, _loaded])
@pytest.mark.parametrize("options", [{}, {"gradient": "full"}, {"bound": True}, {"mode": "scale"}])
def test_models_changed_in_inference_mode_go_on(
    change: Callable[[nn.Module], nn.Module], used: bool, options: dict
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = apply_spectral_norm(large(nn.Sequential(nn.Linear(8, 8))), x[:1], **options)
    want = model(x).detach()
    with torch.inference_mode():
        model = change(model)
        if used:
            model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
        layer = model[0]
        layer.parametrizations.weight.original = nn.Parameter(torch.randn(8, 8) * 5)
        assert norm_of(layer.weight) == pytest.approx(1, rel=5e-3)
    layer.bias = nn.Parameter(torch.zeros(8))
    model(x).square().sum().backward()  # the state can be written and saved for a backward
    assert layer.parametrizations.weight.original.grad.isfinite().all()


# -- layers that are not called, or called otherwise -------------------------------------------------------------------


class Branches(nn.Module):
    """Calls ``seen``; ``late`` in training alone; reads the weight of ``read`` without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.late, self.read = (nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.seen(F.conv2d(x, self.read.weight, padding=1))
        return self.late(x) if self.training else x


@pytest.mark.parametrize(("exclude", "names"), [(None, ["late", "read"]), ("read", ["late"]), ("read|late", [])])
def test_convolutions_that_the_example_does_not_call_are_named(
    exclude: str | None, names: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    model, x = large(Branches()), torch.randn(1, 2, 6, 6)
    apply_spectral_norm(model, x, exclude=exclude)
    said = [str(w.message) for w in recwarn if "does not call" in str(w.message)]
    assert [all(repr(n) in text for n in names) for text in said] == [True] * bool(names)
    if exclude:  # the remedy that the message gives
        spectral_norm(model.read, input_size=6)
    model(x)
    for name in {"seen", *names} - {"read"} | ({"read"} if exclude else set()):
        assert norm_of_convolution(getattr(model, name).weight, 6) == pytest.approx(1, rel=1e-2)


def _conv_named_x() -> nn.Conv2d:
    class Renamed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    return Renamed(2, 3, 3, padding=1)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (_conv_named_x, lambda layer, x: layer(x=x)),
        (_conv_named_x, lambda layer, x: layer(x)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1), lambda layer, x: layer(input=x)),
        (lambda: nn.ConvTranspose2d(2, 3, 3, padding=1), lambda layer, x: layer(output_size=[6, 6], input=x)),
    ],
)
def test_the_input_of_a_convolution_may_be_any_argument(make: Callable, call: Callable, whole: bool) -> None:
    torch.manual_seed(0)
    layer, x = large(make()), torch.randn(1, 2, 6, 6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return call(self.layer, x)

    model = apply_spectral_norm(Model(), x) if whole else Model()
    if not whole:
        spectral_norm(layer)
    model(x)
    w = layer.weight.flip(2, 3).transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    assert norm_of_convolution(w, 6) == pytest.approx(1, rel=1e-2)


# -- removal from tied weights -----------------------------------------------------------------------------------------


def tied(size: float, first: dict | None, second: dict | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.copy_(size * torch.randn(8, 8) / norm_of(torch.randn(8, 8)))
    model[2].weight = model[0].weight
    for layer, options in ((model[0], first), (model[2], second)):
        if options is not None:
            spectral_norm(layer, **options)
    return model


@pytest.mark.parametrize(
    ("size", "first", "second", "fits"),
    [
        (9, {}, None, False),
        (9, None, {}, False),
        (9, {}, {"beta": 2}, False),
        (9, {"mode": "scale"}, {"mode": "scale", "beta": 3}, False),
        (9, {}, {}, True),
        (9, {}, {"mode": "scale"}, True),
        (0.1, {}, None, True),
        (0.1, {"beta": 2}, {}, True),
        (0.1, {"mode": "scale"}, {}, False),
    ],
)
def test_removal_changes_no_layer_that_shares_the_weight(
    size: float, first: dict | None, second: dict | None, fits: bool
) -> None:
    model, x = tied(size, first, second), torch.arange(8)
    before = model(x).detach()
    if fits:
        remove_spectral_norm(model)
    else:
        with pytest.raises(ValueError, match=r"are one parameter.* untie them first"):
            remove_spectral_norm(model)
        torch.testing.assert_close(model(x), before)
        layer = model[0]
        home = layer.parametrizations.weight if hasattr(layer, "parametrizations") else layer
        name = "original" if home is not layer else "weight"
        setattr(home, name, nn.Parameter(getattr(home, name).detach().clone()))  # the remedy that the message gives
        remove_spectral_norm(model)
    assert not sigmas(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


# -- what cannot be done is said, and changes nothing ------------------------------------------------------------------


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def _script(model: nn.Sequential, new: Tensor) -> None:
    torch.jit.script(model)


def _call_with_the_weight(model: nn.Sequential, new: Tensor) -> None:
    functional_call(model, {"0.bias": torch.zeros(8), "2.weight": new, "2.bias": torch.ones(8)}, (torch.ones(1, 8),))


def _assign_a_parameter(model: nn.Sequential, new: Tensor) -> None:
    model[2].weight = nn.Parameter(new)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (_script, RuntimeError, r"torch\.jit\.script cannot compile layer '0'.*remove_spectral_norm"),
        (_call_with_the_weight, ValueError, r"layer '2' .*'parametrizations\.weight\.original'"),
        (_assign_a_parameter, KeyError, r"parametrizations\.weight\.original; assign the nn\.Parameter to that"),
    ],
)
def test_refusals_name_the_remedy_and_leave_the_model_as_it_was(
    act: Callable[[nn.Sequential, Tensor], None], error: type[Exception], says: str, below: bool
) -> None:
    model, x = two_layers(), torch.randn(3, 8)
    if below:
        torch.nn.utils.parametrize.register_parametrization(model[2], "weight", Same())
    before, y = copy.deepcopy(model.state_dict()), model(x).detach()
    with pytest.raises(error, match=says):
        act(model, torch.randn(8, 8))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(x), y)
    with torch.no_grad():  # a plain tensor is the raw weight, as everywhere in PyTorch
        model[2].weight = 3 * torch.eye(8)
    torch.testing.assert_close(model[2].weight, torch.eye(8), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
@pytest.mark.parametrize("size", [None, 6, 4, "any"])
def test_tracing_takes_sizes_as_numbers(size: int | str | None, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(large(nn.Conv2d(2, 3, 3, padding=1)), input_size=size))
    x = torch.randn(1, 2, 6, 6)
    if size is None:
        with pytest.raises(
            RuntimeError, match=r"not known yet inside torch\.jit\.trace; give input_size=.*eager forward"
        ):
            torch.jit.trace(model, x)
        model(x)  # the remedy that the message gives
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(2 * x), model(2 * x))
    said = [str(w.message) for w in recwarn if "torch.jit" not in str(w.message)]
    assert [re.search(r"used at \(6, 6\)", text) is not None for text in said] == [True] * (size == 4)


# -- normalised weights that the backward makes again ------------------------------------------------------------------


def _as_views(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.view(4, 16).view(8, 8)) + x @ w[:, ::1].T + (x @ w.T[:, 2:] @ w[2:]) * w.exp().mean()


def _as_complex(x: Tensor, w: Tensor) -> Tensor:
    z, c = torch.view_as_complex(w.view(8, 4, 2)), torch.view_as_complex(x.view(-1, 4, 2))
    return (c @ z.T).abs() + (c @ z.conj().T).imag


def _as_negative(x: Tensor, w: Tensor) -> Tensor:
    minus = torch.view_as_complex(w.view(8, 4, 2)).conj().imag  # with a lazy minus
    return x[:, :4].exp() * (x[:, :4] @ minus[:4]) + (x[:, :4] * minus[0]).square()


def _written_in_place(x: Tensor, w: Tensor) -> Tensor:
    w[0] = 0
    w[:, 1] *= 3
    return F.linear(x, w)


class Made(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(8, 8)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("options", [{}, {"mode": "scale"}, {"beta": 100.0}, {"gradient": "full"}])
@pytest.mark.parametrize("use", [F.linear, _as_views, _as_complex, _as_negative, _written_in_place])
def test_gradients_with_weights_made_again_are_those_with_kept_ones(
    use: Callable[[Tensor, Tensor], Tensor], options: dict, twice: bool
) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(Made(use), **options)
    found = []
    for module in (layer, copy.deepcopy(layer)):
        if found:
            module.parametrizations.weight[0].sharded = True
            keep_no_copies(module)
        x = torch.linspace(-1, 1, 24).reshape(3, 8).requires_grad_()
        wanted = [x, *module.parameters()]
        grads = torch.autograd.grad(module(x).square().sum(), wanted, create_graph=twice)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted) if twice else grads)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
