"""Each activation's constant against its slopes on a fine grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .truth import bound_of, jacobian_norm, report_of, steepest

MODULES = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(-1.7), nn.RReLU(0.1, 3.0)),
    *(nn.ELU(), nn.ELU(2.5), nn.CELU(0.7), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()),
    *(nn.Softplus(), nn.Softplus(3.0), nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(), nn.Tanhshrink(), nn.Softsign()),
    *(nn.Softshrink(0.3), nn.Hardtanh(-2, 1.5), nn.Hardswish(), nn.Hardsigmoid(), nn.Threshold(0.5, 0.5)),
    *(nn.PReLU(), nn.PReLU(init=-2.0)),
]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "relu()": lambda x: x.relu(),
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 1.3),
    "leaky_relu named": lambda x: F.leaky_relu(input=x, negative_slope=1.3),
    "elu": lambda x: F.elu(x, alpha=2.0),
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "F.sigmoid": F.sigmoid,
    "torch.sigmoid": torch.sigmoid,
    "sigmoid()": lambda x: x.sigmoid(),
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "tanh()": lambda x: x.tanh(),
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "softshrink": F.softshrink,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "threshold": lambda x: F.threshold(x, 1.0, 1.0),
    "rrelu": lambda x: F.rrelu(x, 1.0, 2.0, training=False),
    "prelu": lambda x: F.prelu(x, torch.tensor([1.5], dtype=x.dtype)),
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "clamp named": lambda x: torch.clamp(x, min=0.1),
    "abs": abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "neg": lambda x: -x,
}
GRID = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
FAR = torch.linspace(-200, 200, 20_001, dtype=torch.float64)
AT_ZERO = torch.tensor([-1e-9, 1e-9], dtype=torch.float64)  # one-sided slopes


def largest_slope(f: Callable[[Tensor], Tensor]) -> float:
    x = torch.cat([GRID, FAR, AT_ZERO]).requires_grad_()
    (slopes,) = torch.autograd.grad(f(x[None] * 1).sum(), x)  # * 1: for those that write in place
    return float(slopes.abs().max())


@torch.no_grad()
def secant(f: Callable[[Tensor], Tensor]) -> float:
    values = f(GRID[None] * 1)[0]
    return float((values.diff() / GRID.diff()).abs().max())


def check(f: Callable[[Tensor], Tensor]) -> None:
    truth, bound = largest_slope(f), bound_of(f, torch.randn(1, 7, dtype=torch.float64))
    # PyTorch keeps 1/6 and alpha in float32.
    assert truth * (1 - 1e-7) <= bound <= truth + 1e-4
    assert secant(f) <= bound * (1 + 1e-6)  # sees jumps too


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules(module: nn.Module) -> None:
    check(module.double().eval())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods(name: str) -> None:
    check(FUNCTIONS[name])


def test_prelu_with_a_slope_per_channel() -> None:
    module = nn.PReLU(3).double()
    module.weight.data = torch.tensor([0.5, -3.0, 1.0], dtype=torch.float64)
    assert bound_of(module, torch.randn(1, 3, 4, dtype=torch.float64)) == 3.0


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Hardshrink(), "jumps"),
        (nn.Threshold(0.5, 0.0), "jumps"),
        (nn.CELU(-1.0), "exponentially"),
        (nn.Softplus(1.0, threshold=1.0), "jumps"),
        (nn.GLU(), "product of two activations"),
    ],
)
def test_no_finite_bound(module: nn.Module, says: str) -> None:
    report = report_of(module, torch.randn(1, 4))
    assert math.isinf(report.bound)
    assert says in report.reason


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("f", [F.softmax, F.softmin, F.log_softmax])
def test_softmax(f: Callable[..., Tensor], n: int) -> None:
    bound = bound_of(lambda x: f(x, dim=1), torch.randn(1, n))
    found = steepest(lambda x: f(x, dim=0), (n,), samples=200, scale=4.0)
    assert found <= bound
    # Attained: two equal large logits; one large logit.
    top = torch.full((n,), -60.0, dtype=torch.float64)
    top[0] = 0.0
    if f is not F.log_softmax:
        top = top.abs() if f is F.softmin else top
        top[1] = top[0]
    assert bound == pytest.approx(jacobian_norm(lambda x: f(x, dim=0), top), rel=1e-6)


def test_softmax_methods_and_modules() -> None:
    x = torch.randn(1, 5)
    for f in (nn.Softmax(1), nn.Softmin(1), lambda x: x.softmax(1), lambda x: torch.softmax(x, 1)):
        assert bound_of(f, x) == 0.5
    for f in (nn.LogSoftmax(1), lambda x: x.log_softmax(1)):
        assert bound_of(f, x) == pytest.approx(math.sqrt(5))


def test_dropout_counts_only_when_it_is_active() -> None:
    x = torch.randn(1, 4)
    assert bound_of(nn.Dropout(0.5), x) == 1.0
    assert bound_of(lambda x: F.dropout(x, 0.5, training=False), x) == 1.0
    assert "random" in report_of(lambda x: F.dropout(x, 0.5), x).reason
