"""Linear layers, their functions, batch normalisation and products with constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sn_fast.lipschitz import lipschitz_bound, products

from .truth import bound_of, jacobian_norm, random_statistics, report_of

CLOSE = 2e-2  # certificates may be that far above


class Functional(nn.Module):
    """A function of the input and a weight that is the module's parameter."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.f = f
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.weight)


def check(model: nn.Module, *shape: int, close: float = CLOSE) -> None:
    x = torch.randn(1, *shape, dtype=torch.float64)
    model = model.double().eval()
    truth = jacobian_norm(model, x)
    assert truth * (1 - 1e-12) <= bound_of(model, x) <= truth * (1 + close)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(7, 4), (7,)),
        (nn.Linear(7, 4), (3, 7)),
        (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 6, 5)),
        (nn.Conv2d(2, 3, (3, 2), padding="same", padding_mode="circular", dilation=(1, 2)), (2, 5, 6)),
        (nn.Conv3d(2, 2, 2), (2, 3, 4, 3)),
        (nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1), (3, 5)),
        (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2), (4, 4, 5)),
    ],
    ids=str,
)
def test_a_layer_alone_is_its_norm(module: nn.Module, shape: tuple[int, ...]) -> None:
    check(module, *shape)
    check(nn.Sequential(module), *shape)


@pytest.mark.parametrize(
    ("f", "weight", "shape"),
    [
        (lambda x, w: F.linear(x, w), (4, 7), (7,)),
        (lambda x, w: F.linear(x, w, torch.ones(4, dtype=w.dtype)), (4, 7), (3, 7)),
        (lambda x, w: F.conv1d(x, w, padding=2, dilation=2), (4, 3, 3), (3, 9)),
        (lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 2), (6, 2, 3, 3), (4, 6, 5)),
        (lambda x, w: F.conv2d(x, w, stride=(1, 2), padding="valid"), (3, 2, 3, 2), (2, 5, 6)),
        (lambda x, w: F.conv3d(x, w), (2, 2, 2, 2, 2), (2, 3, 4, 3)),
        (lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2, 1), (4, 2, 3, 3), (4, 4, 5)),
        (lambda x, w: F.conv_transpose1d(x, w, dilation=2), (3, 2, 3), (3, 5)),
        (lambda x, w: x @ w, (7, 4), (3, 7)),
        (lambda x, w: torch.matmul(x, w), (7,), (3, 7)),
        (lambda x, w: w @ x, (5, 3), (3, 7)),
        (lambda x, w: x[0] @ w, (2, 7, 4), (3, 7)),
        (lambda x, w: x.mm(w), (7, 4), (7,)),
        (lambda x, w: torch.bmm(w, x), (1, 5, 3), (3, 7)),
        (lambda x, w: torch.addmm(torch.ones(4, dtype=w.dtype), x, w, alpha=2), (7, 4), (7,)),
        (lambda x, w: torch.addmm(x, w, w, beta=3), (4, 4), (4,)),
        (lambda x, w: x * w, (7,), (3, 7)),
        (lambda x, w: w / 2 * x, (7,), (3, 7)),
        (lambda x, w: F.batch_norm(x, w.detach(), w.detach().abs(), w, w), (3,), (3, 7)),
    ],
)
def test_functions(f: Callable[[Tensor, Tensor], Tensor], weight: tuple[int, ...], shape: tuple[int, ...]) -> None:
    close = 0.5 if weight == (2, 7, 4) else CLOSE  # of a stack the copies and the largest count
    check(Functional(f, *weight), *shape, close=close)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (6,)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (2, 7)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 5, 6)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6)), (4, 4, 3)),
        (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 3, 3, 3)),
    ],
    ids=["linear", "conv1d", "grouped", "transposed", "conv3d"],
)
def test_batch_norm_is_folded(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    random_statistics(model)
    check(model, *shape)
    x = torch.randn(1, *shape, dtype=torch.float64)
    folded, apart = report_of(model, x), report_of(model, x, fold_batchnorm=False)
    assert folded.bound < apart.bound
    assert [row.name for row in folded.layers] == ["0 + 1"]
    assert [row.kind for row in apart.layers] == [type(model[0]).__name__, type(model[1]).__name__]


def test_batch_norm_alone() -> None:
    norm = random_statistics(nn.BatchNorm2d(3))
    check(norm, 3, 4, 4, close=1e-9)
    check(random_statistics(nn.SyncBatchNorm(3)), 3, 4, 4, close=1e-9)
    instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    instance.running_var.uniform_(0.5, 2)
    check(instance, 3, 4, 4, close=1e-9)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3), nn.InstanceNorm2d(3, affine=True)]
)
def test_batch_norm_without_statistics(norm: nn.Module) -> None:
    report = report_of(nn.Sequential(nn.Conv2d(3, 3, 1), norm), torch.randn(1, 3, 4, 4))
    assert math.isinf(report.bound)
    assert "deviation of its own input" in report.reason
    assert [row.kind for row in report.layers] == ["Conv2d", type(norm).__name__]


def test_batch_norm_over_another_dimension_is_not_folded() -> None:
    model = random_statistics(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    x = torch.randn(1, 4, 5, dtype=torch.float64)  # the norm's channels are not the layer's outputs
    report = report_of(model, x)
    assert len(report.layers) == 2
    assert jacobian_norm(model, x) <= report.bound


def test_not_folded_where_the_layer_is_used_elsewhere() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    model = random_statistics(Both())
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    report = report_of(model, x)
    assert [row.kind for row in report.layers] == ["Conv2d", "BatchNorm2d", "add"]
    assert jacobian_norm(model, x) <= report.bound


def test_a_weight_that_depends_on_the_input_is_not_folded() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.norm = nn.Parameter(torch.randn(1, 4)), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.linear(self.features, x))

    assert math.isinf(bound_of(Hyper(), torch.randn(3, 4)))


def test_a_layer_used_twice_is_bounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true_bound = products.operator_norm_bound

    def counted(op, **keywords):
        calls.append(op.in_shape)
        return true_bound(op, **keywords)

    monkeypatch.setattr(products, "operator_norm_bound", counted)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    other = nn.Conv2d(2, 2, 3, padding=1)
    report_of(nn.Sequential(conv, nn.ReLU(), conv, nn.MaxPool2d(2), conv, other), torch.randn(1, 2, 6, 6))
    assert calls == [(2, 6, 6), (2, 3, 3), (2, 3, 3)]


@pytest.mark.parametrize(
    ("module", "x", "says"),
    [
        (nn.Embedding(5, 3), torch.tensor([[1, 2]]), "indices"),
        (nn.EmbeddingBag(5, 3), torch.tensor([[1, 2]]), "indices"),
        (nn.LayerNorm(4), torch.randn(1, 4), "deviation of its own input"),
        (nn.GroupNorm(2, 4), torch.randn(1, 4, 3), "deviation of its own input"),
        (nn.RMSNorm(4), torch.randn(1, 4), "its own input"),
        (nn.CrossMapLRN2d(2), torch.randn(1, 4, 3, 3), "its own input"),
        (nn.LSTM(4, 3), torch.randn(1, 2, 4), "recurrent"),
        (nn.GRU(4, 3), torch.randn(1, 2, 4), "recurrent"),
        (nn.Fold((4, 4), 2), torch.randn(1, 4, 9), "no rule for Fold"),
        (nn.TransformerEncoderLayer(4, 2, batch_first=True), torch.randn(1, 3, 4), "dot products"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_modules_without_a_bound(module: nn.Module, x: Tensor, says: str) -> None:
    report = report_of(nn.Sequential(module), x)
    assert math.isinf(report.bound)
    assert says in report.reason
    (row,) = report.layers
    assert row.constant == math.inf


def test_several_arguments() -> None:
    x = torch.randn(1, 4)
    report = lipschitz_bound(nn.Bilinear(4, 4, 2), (x, x))
    assert "product of two activations" in report.reason

    class Sum(nn.Module):
        def forward(
            self, a: Tensor, b: Tensor, scale: float = 2.0, mask: Tensor | None = None, sizes: tuple = ()
        ) -> Tensor:
            return a + scale * b if mask is None else a * mask

    assert lipschitz_bound(Sum(), (x, x)).bound == pytest.approx(3.0)  # the truth is sqrt(5)
    assert lipschitz_bound(Sum(), (x, x, 4.0)).bound == pytest.approx(5.0)
    attention = lipschitz_bound(nn.MultiheadAttention(4, 2), (x, x, x))
    assert "dot products" in attention.reason


@settings(max_examples=25)
@given(st.data())
def test_random_convolutions(data) -> None:
    groups = data.draw(st.integers(1, 2))
    module = nn.Conv2d(
        groups * data.draw(st.integers(1, 3)),
        groups * data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        stride=data.draw(st.integers(1, 2)),
        padding=data.draw(st.integers(0, 2)),
        dilation=data.draw(st.integers(1, 2)),
        groups=groups,
        padding_mode=data.draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"])),
    )
    check(module, module.in_channels, 5, 6)
