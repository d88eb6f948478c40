"""TensorFlow's layers: the published outputs, sums over windows in float64, dense operators."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast import (
    apply_spectral_norm,
    lipschitz_bound,
    operator_norm,
    operator_norm_bound,
    operator_of,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)
from sn_fast.experiments.networks.layers import (
    FlattenNHWC,
    LocalResponseNorm,
    SameAvgPool2d,
    SameConv2d,
    batch_norm,
    convolution,
    same_max_pool,
)
from tests.published import image, same_padding

OPS = {
    "lrn_X7": LocalResponseNorm(),
    "lrn_strong_X7": LocalResponseNorm(alpha=0.5),
    "maxpool3s2_VALID_X7": nn.MaxPool2d(3, 2),
    "maxpool3s2_SAME_X8": same_max_pool(3, 2, (8, 8)),
    "maxpool3s2_SAME_X7": same_max_pool(3, 2, (7, 7)),
    "avgpool7s1_SAME_X7": SameAvgPool2d(7),
    "elu_X7": nn.ELU(),
    "bn_train_X7": batch_norm(12),
}


@pytest.mark.parametrize("name", OPS)
def test_published_outputs(name: str, published) -> None:
    arrays = published("ops.npz")
    layer = copy.deepcopy(OPS[name])
    ours = layer(image(arrays[name.rpartition("_")[2]])).detach()
    torch.testing.assert_close(ours, image(arrays[name]), rtol=1e-5, atol=1e-5)
    if name.startswith("bn"):
        torch.testing.assert_close(layer.running_mean, torch.from_numpy(arrays["bn_after1update.moving_mean"]))
        torch.testing.assert_close(layer.running_var, torch.from_numpy(arrays["bn_after1update.moving_variance"]))


sides = st.integers(1, 9)


@given(kernel=st.integers(1, 8), stride=st.integers(1, 4), height=sides, width=sides, bias=st.booleans())
def test_same_convolution_is_the_sum_over_its_windows(kernel: int, stride: int, height: int, width: int, bias: bool):
    layer = convolution(2, 3, kernel, stride=stride, bias=bias).double()
    x = torch.randn(2, 2, height, width, dtype=torch.float64)
    windows = padded_windows(x, kernel, stride, 0.0)  # (B, C, h, w, k, k)
    wanted = torch.einsum("bchwij,ocij->bohw", windows, layer.weight)
    if bias:
        wanted = wanted + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), wanted)


@given(kernel=st.integers(1, 5), stride=st.integers(2, 4), height=sides, width=sides)
def test_same_max_pooling(kernel: int, stride: int, height: int, width: int) -> None:
    x = torch.randn(2, 2, height, width)
    wanted = padded_windows(x, kernel, stride, -torch.inf).amax((-1, -2))
    assert torch.equal(same_max_pool(kernel, stride, (height, width))(x), wanted)


@given(kernel=st.integers(1, 8), height=sides, width=sides)
def test_same_average_pooling_leaves_padding_out(kernel: int, height: int, width: int) -> None:
    x = torch.randn(2, 2, height, width)
    wanted = padded_windows(x, kernel, 1, torch.nan).nanmean((-1, -2))
    torch.testing.assert_close(SameAvgPool2d(kernel)(x), wanted)


def padded_windows(x: Tensor, kernel: int, stride: int, fill: float) -> Tensor:
    (top, bottom), (left, right) = (same_padding(side, kernel, stride) for side in x.shape[2:])
    padded = nn.functional.pad(x, (left, right, top, bottom), value=fill)
    return padded.unfold(2, kernel, stride).unfold(3, kernel, stride)


def test_flatten_is_in_published_order() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert np.array_equal(FlattenNHWC()(x).numpy(), x.numpy().transpose(0, 2, 3, 1).reshape(2, -1))


GEOMETRIES = [(3, 2, (12, 12)), (4, 1, (7, 9)), (8, 2, (14, 13)), (5, 3, (11, 10)), (2, 2, (5, 6)), (6, 4, (9, 9))]


@pytest.mark.parametrize(("kernel", "stride", "size"), GEOMETRIES)
def test_true_operator_of_same_padding(kernel: int, stride: int, size: tuple[int, int]) -> None:
    layer = SameConv2d(2, 3, kernel, stride)
    op = operator_of(layer, size)
    zero = torch.zeros(1, 2, *size)
    columns = torch.eye(zero.numel()).view(-1, 2, *size)
    dense = (layer(columns) - layer(zero)).detach().flatten(1).T
    torch.testing.assert_close(op.to_dense(), dense)
    exact = float(torch.linalg.matrix_norm(dense.double(), 2))
    assert float(operator_norm(op)) == pytest.approx(exact, rel=1e-5)
    for method in ("auto", "fft", "dense"):
        assert exact <= float(operator_norm_bound(op, method=method)) <= 1.5 * exact
    assert float(operator_norm_bound(op)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "size"), GEOMETRIES)
@pytest.mark.parametrize("bound", [False, True])
def test_same_padding_is_normalised_by_its_true_norm(kernel, stride, size, bound) -> None:
    x = torch.randn(3, 2, *size)
    network = nn.Sequential(SameConv2d(2, 3, kernel, stride))
    exact = float(torch.linalg.matrix_norm(operator_of(network[0], size).to_dense().detach().double(), 2))
    apply_spectral_norm(network, x, beta=0.3, bound=bound)
    update_spectral_norm(network, 100)
    assert sigmas(network)["0"] == pytest.approx(exact, rel=1e-3)
    capped = float(torch.linalg.matrix_norm(operator_of(network[0]).to_dense().detach().double(), 2))
    assert capped == pytest.approx(0.3, rel=1e-3)
    if bound:
        assert capped <= 0.3
    assert capped <= lipschitz_bound(network, x).bound <= 0.34
    twin = copy.deepcopy(network)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x), network(x))


def test_without_a_size_the_message_names_it() -> None:
    with pytest.raises(ValueError, match=r"input_size of this SameConv2d"):
        operator_of(SameConv2d(1, 1, 3, 2))
    layer = spectral_norm(SameConv2d(1, 1, 4, 2), beta=0.1)
    layer(torch.randn(1, 1, 6, 6))
    assert float(operator_norm(operator_of(layer))) == pytest.approx(0.1, rel=1e-2)
