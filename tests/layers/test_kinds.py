"""The registry of layer kinds: embeddings of bags, and users' layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sn_fast
from sn_fast import (
    ConvOperator,
    LinearOperator,
    MatrixOperator,
    SpectralProjection,
    apply_spectral_norm,
    operator_norm,
    operator_norm_interval,
    operator_of,
    register_layer,
    spectral_norm,
    spectral_norm_summary,
)
from sn_fast.inspection import inspect_model
from sn_fast.layers import kinds


def dense_norm(module: nn.Module, *shape: int) -> float:
    """Of the module itself, column by column."""
    dtype = next(module.parameters()).dtype
    zero = torch.zeros(1, *shape, dtype=dtype)
    n = zero.numel()
    with torch.no_grad():
        images = module(torch.eye(n, dtype=dtype).reshape(n, *shape)) - module(zero)
    return float(torch.linalg.matrix_norm(images.flatten(1).double(), 2))


class PlainConv(nn.Conv2d):
    """A convolution under another name, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class StdConv(nn.Conv2d):
    def standardised(self, w: Tensor) -> Tensor:
        return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardised(self.weight), self.bias, self.stride, self.padding)


class QuantisedLinear(nn.Linear):
    def quantised(self, w: Tensor) -> Tensor:
        return torch.round(w * 8) / 8

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised(self.weight), self.bias)


class Gain(nn.Module):
    """No layer of PyTorch: a matrix with the input's dimension first, and a gain."""

    def __init__(self, n: int, m: int, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, m))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x @ self.weight


class Masked(nn.Conv2d):
    """A convolution with a mask and a gain."""

    def mask(self, w: Tensor) -> Tensor:
        return w * (torch.arange(w[0].numel()).reshape(w[0].shape) % 3 > 0) * 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.mask(self.weight), self.bias)


class Blur(nn.Module):
    """Two convolutions: its operator is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))
        self.register_buffer("blur", torch.ones(3, 1, 2, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.weight, padding=1), self.blur, groups=3)


def conv(m: Any, weight: Tensor, size: tuple[int, ...]) -> LinearOperator:
    return ConvOperator(weight, size, stride=m.stride, padding=m.padding)


def masked(m: Any, weight: Tensor, size: tuple[int, ...]) -> LinearOperator:
    return ConvOperator(m.mask(weight), size, stride=m.stride, padding=m.padding, groups=m.groups)


def blurred(m: Any, weight: Tensor, size: tuple[int, ...]) -> LinearOperator:
    return ConvOperator(m.blur, size, groups=3) @ ConvOperator(weight, size, padding=1)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_layer(PlainConv, operator=conv, default=True)
    register_layer(StdConv, operator=lambda m, w, size: conv(m, m.standardised(w), size))
    register_layer(QuantisedLinear, operator=lambda m, w, _: MatrixOperator(m.quantised(w)))
    register_layer(Gain, operator=lambda m, w, _: m.gain * MatrixOperator(w.T))
    register_layer(Masked, operator=masked)
    register_layer(Blur, operator=blurred, spatial_axes=2)
    yield
    for cls in (PlainConv, StdConv, QuantisedLinear, Gain, Masked, Blur):
        kinds.unregister_layer(cls)


LAYERS = {
    "plain": (lambda: PlainConv(3, 4, 3, stride=2, padding=1), (3, 9, 8)),
    "standardised": (lambda: StdConv(3, 4, 3, padding=1), (3, 7, 8)),
    "quantised": (lambda: QuantisedLinear(7, 5), (7,)),
    "gain": (lambda: Gain(6, 4, 5.0), (6,)),
    "masked": (lambda: Masked(3, 4, 3, padding=1), (3, 7, 8)),
    "masked, groups": (lambda: Masked(4, 4, 3, groups=2), (4, 6, 5)),
    "product": (Blur, (2, 7, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_registered_layers_are_measured_by_their_operator(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer = make()
    op = operator_of(layer, shape[1:] or None)
    truth = dense_norm(layer, *shape)
    assert float(operator_norm(op)) == pytest.approx(truth, rel=1e-5)
    lower, upper, info = operator_norm_interval(op, return_info=True)
    assert float(lower) <= truth * (1 + 1e-6)
    assert truth <= float(upper) * (1 + 1e-6)
    assert info.certified
    row = inspect_model(nn.Sequential(layer), shape).layers[0]
    assert row.lower is not None
    assert row.lower <= truth * (1 + 1e-6)
    assert row.upper == pytest.approx(truth, rel=2e-2)


@pytest.mark.parametrize("bound", [False, True])
def test_a_map_that_is_the_weights_can_be_normalised(bound: bool) -> None:
    torch.manual_seed(0)
    layer = PlainConv(3, 4, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), StdConv(4, 4, 3, padding=1))
    x = torch.randn(1, 3, 8, 7)
    apply_spectral_norm(model, x, beta=0.7, bound=bound)  # PlainConv is a default, StdConv is not
    assert dense_norm(layer, 3, 8, 7) == pytest.approx(0.7, rel=1e-2)
    assert not hasattr(model[2], "parametrizations")
    assert "conv 3x3 at 8x7" in spectral_norm_summary(model)


def test_without_an_input_size() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(PlainConv(3, 4, 3, padding=1))
    layer(torch.randn(1, 3, 8, 7))
    assert dense_norm(layer, 3, 8, 7) == pytest.approx(1.0, rel=1e-2)
    with pytest.raises(ValueError, match="is known at one input size at a time"):
        spectral_norm(PlainConv(3, 4, 3), input_size="any")
    register_layer(PlainConv, operator=conv, nominal_size=lambda m: (16, 16))
    layer = spectral_norm(PlainConv(3, 4, 3, padding=1), input_size="any")
    assert dense_norm(layer, 3, 8, 7) <= 1


@pytest.mark.parametrize("name", ["gain", "masked", "masked, groups"])
@pytest.mark.parametrize("gradient", ["detached", "full"])
@pytest.mark.parametrize("mode", ["cap", "scale"])
def test_linear_functions_of_the_weight_are_normalised(name: str, gradient: str, mode: str) -> None:
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    layer = make().double()
    cls, before, raw = type(layer), dense_norm(layer, *shape), layer.weight.detach().clone()
    beta = 0.3 * before
    x = torch.randn(2, *shape).double()
    model = nn.Sequential(layer)
    apply_spectral_norm(model, x, include=cls, beta=beta, gradient=gradient, mode=mode, n_power_iterations=30)
    assert dense_norm(layer, *shape) == pytest.approx(beta, rel=1e-3)
    assert sn_fast.sigmas(model)["0"] == pytest.approx(before, rel=1e-3)
    assert float(spectral_norm_summary(model).splitlines()[1].split()[-1]) == pytest.approx(beta, rel=2e-2)
    # The gradient is that of W / (sigma(W) / beta): orthogonal to W, as the layer does not change with its length.
    model(x).square().sum().backward()
    grad = layer.parametrizations.weight.original.grad
    assert float((grad * raw).sum()) == pytest.approx(0, abs=1e-3 * float(grad.norm() * raw.norm()))
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    assert dense_norm(layer, *shape) == pytest.approx(beta, rel=1e-3)
    twin = make().double()
    apply_spectral_norm(nn.Sequential(twin), x, include=cls, beta=beta, gradient=gradient, mode=mode)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert float(operator_norm(operator_of(layer))) == pytest.approx(beta, rel=1e-3)
    sn_fast.remove_spectral_norm(layer)
    assert dense_norm(layer, *shape) == pytest.approx(beta, rel=1e-3)


@pytest.mark.parametrize("name", ["gain", "masked"])
def test_bound_wants_the_parameter_itself(name: str) -> None:
    make, shape = LAYERS[name]
    with pytest.raises(ValueError, match="another weight than the parameter itself"):
        spectral_norm(make(), input_size=shape[1:] or None, bound=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("standardised", "not proportional to the weight"),
        ("quantised", "not proportional to the weight|another weight"),
        ("product", "not one convolution or matrix of the weight"),
    ],
)
@pytest.mark.parametrize("sized", [True, False])
def test_others_are_refused_with_the_reason(name: str, reason: str, sized: bool) -> None:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make()
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=f"cannot be normalised by its weight: .*({reason}).*can be measured"):
        spectral_norm(layer, input_size=shape[1:] if sized and shape[1:] else None)
    with pytest.raises(ValueError, match=f"layer '0' cannot be normalised.*({reason}).*exclude="):
        apply_spectral_norm(nn.Sequential(layer), torch.randn(1, *shape), include=type(layer))
    assert torch.equal(layer.weight, before)
    assert not hasattr(layer, "parametrizations")


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_map_counts_to_rows(cls: type, mode: str, max_norm: float | None) -> None:
    torch.manual_seed(0)
    options = {"mode": mode} if cls is nn.EmbeddingBag else {}
    layer = cls(9, 4, max_norm=max_norm, **options).double()
    op = operator_of(layer)
    weight = layer.weight.detach().clone()
    indices = torch.randint(9, (5, 6))
    counts = F.one_hot(indices, 9).double().sum(1)
    with torch.no_grad():
        out = layer(indices)
    if cls is nn.Embedding:
        out = out.sum(1)
    elif mode == "mean":
        counts /= 6
    torch.testing.assert_close(op.matvec(counts).detach(), out)
    if max_norm is None:
        assert float(operator_norm(op)) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-6)
        normalised = spectral_norm(layer)
        assert float(operator_norm(operator_of(normalised))) == pytest.approx(1.0, rel=1e-3)


def test_a_bag_of_maxima_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='max'"):
        operator_of(nn.EmbeddingBag(9, 4, mode="max"))


def test_arguments_of_register_layer() -> None:
    with pytest.raises(TypeError, match="cls="):
        register_layer(3, operator=conv)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="operator="):
        register_layer(PlainConv, operator=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Conv2d is a layer that sn_fast knows"):
        register_layer(nn.Conv2d, operator=conv)
    with pytest.raises(ValueError, match="spatial_axes=-1"):
        register_layer(PlainConv, operator=conv, spatial_axes=-1)
    for dim in (-1, True, 1.0, "0"):
        with pytest.raises(ValueError, match=re.escape(f"matrix_dim={dim!r}")):
            register_layer(PlainConv, operator=conv, matrix_dim=dim)  # type: ignore[arg-type]
    register_layer(Gain, operator=lambda m, w, _: w)
    with pytest.raises(TypeError, match="operator of Gain returned a"):
        operator_of(Gain(3, 4, 1.0))


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_rows_of_the_reshaped_matrix(dim: int) -> None:
    register_layer(PlainConv, operator=conv, matrix_dim=dim)
    layer = PlainConv(3, 4, (2, 5)).double()
    matrix = layer.weight.detach().movedim(dim, 0).flatten(1)
    (row,) = inspect_model(layer, (3, 9, 9)).layers
    assert row.reshaped == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
    spectral_norm(layer, operator="reshape", mode="scale", tol=1e-9)
    reshaped = layer.weight.detach().movedim(dim, 0).flatten(1)
    assert float(torch.linalg.matrix_norm(reshaped, 2)) == pytest.approx(1, rel=1e-6)


def test_rows_that_the_weight_does_not_have() -> None:
    register_layer(PlainConv, operator=conv, matrix_dim=4, default=True)
    layer, x = PlainConv(3, 4, 3), torch.randn(2, 3, 9, 9)
    expected = r"matrix_dim=4 of PlainConv, whose weight has shape \(4, 3, 3, 3\); give one of its dimensions, 0 to 3"
    for call in (
        lambda: spectral_norm(layer, operator="reshape"),
        lambda: apply_spectral_norm(nn.Sequential(layer), x, operator="reshape"),
        lambda: SpectralProjection(nn.Sequential(layer), x, operator="reshape"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
        assert type(layer) is PlainConv


def test_an_operator_that_is_not_the_forwards_map() -> None:
    register_layer(PlainConv, operator=lambda m, w, size: 2 * conv(m, w, size))
    with pytest.raises(ValueError, match="registered for PlainConv is not the linear map of its forward"):
        operator_of(PlainConv(3, 4, 3, padding=1), (8, 7))
    register_layer(PlainConv, operator=lambda m, w, size: ConvOperator(w, size))  # without the padding
    with pytest.raises(ValueError, match="is not the linear map of its forward"):
        operator_of(PlainConv(3, 4, 3, padding=1), (8, 7))

    class Fused(PlainConv):  # a registered operator may be the linear part of a layer
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    register_layer(Fused, operator=conv)
    assert operator_of(Fused(3, 4, 3, padding=1), (8, 7)).out_shape == (4, 8, 7)
    kinds.unregister_layer(Fused)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 4), (7, 1), (1, 5), (12, 2)])
@pytest.mark.parametrize("factor", [1, -2])
def test_a_transposed_operator_is_refused(inputs: int, outputs: int, factor: int) -> None:
    register_layer(Gain, operator=lambda m, w, _: factor * MatrixOperator(w))
    layer = Gain(inputs, outputs, 1.0)
    message = rf"takes inputs of shape \({outputs},\), and its forward those of shape \({inputs},\): return the trans"
    with pytest.raises(ValueError, match=message):
        operator_of(layer)
    with pytest.raises(ValueError, match=message):
        apply_spectral_norm(nn.Sequential(layer), torch.zeros(1, inputs), include=Gain)


@pytest.mark.parametrize("factor", [0.5, -3])
def test_a_layer_is_not_normalised_by_an_operator_that_is_not_its_map(factor: float) -> None:
    register_layer(Gain, operator=lambda m, w, _: factor * m.gain * MatrixOperator(w.T))
    layer = Gain(5, 4, 2.0)
    with pytest.raises(ValueError, match="registered for Gain is not the linear map of its forward"):
        apply_spectral_norm(nn.Sequential(layer), torch.zeros(1, 5), include=Gain)
    assert "weight" in layer._parameters


def test_a_registered_layer_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(PlainConv(3, 4, 3, stride=2, padding=1))
        apply_spectral_norm(model, torch.zeros(1, 3, 9, 8))
    assert tuple(operator_of(model[0]).in_shape) == (3, 9, 8)


def test_subclasses_and_replacement() -> None:
    class Sub(PlainConv):
        pass

    class Twice(PlainConv):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert kinds.kind_of(Sub(3, 4, 3)) is kinds.kind_of(PlainConv(3, 4, 3))
    layer = Twice(3, 4, 3)
    assert float(operator_norm(operator_of(layer, (8, 8)))) == pytest.approx(dense_norm(layer, 3, 8, 8), rel=1e-5)
    register_layer(Twice, operator=lambda m, w, size: 2 * conv(m, w, size))
    assert float(operator_norm(operator_of(layer, (8, 8)))) == pytest.approx(
        2 * float(operator_norm(conv(layer, layer.weight, (8, 8)))), rel=1e-5
    )
    kinds.unregister_layer(Twice)


def test_classes_of_layers_are_named_in_the_registry_alone() -> None:
    root = Path(sn_fast.__file__).parent
    named = re.compile(r"isinstance\([^)]*nn\.Conv|CONVOLUTIONS")
    rooms = [root / name for name in ("layers", "norms", "normalization", "lipschitz", "inspection")]
    files = [p for room in rooms for p in room.glob("*.py") if p.name != "kinds.py"]
    found = [p.name for p in files if named.search(p.read_text())]
    assert not found


def test_the_page_on_layers_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    try:
        for block in blocks:
            exec(compile(block, "layers.md", "exec"), namespace)
        truth = dense_norm(namespace["layer"], 3, 12, 12)
        lower, upper = operator_norm_interval(operator_of(namespace["layer"], (12, 12)))
        assert float(lower) <= truth * (1 + 1e-6)
        assert truth <= float(upper) * (1 + 1e-6)
    finally:
        kinds.unregister_layer(namespace["WeightStandardisedConv"])
