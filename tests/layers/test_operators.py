"""The operator protocol: users' operators, compositions, and functions, against matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast import ConvOperator, LinearOperator, MatrixOperator, operator_norm, operator_of
from sn_fast.layers.applying import dense
from sn_fast.reference.geometry import Geometry

from .geometries import Case, cases


class Matrix(LinearOperator):
    """A user's operator: one vector at a time."""

    def __init__(self, w: Tensor) -> None:
        super().__init__((w.shape[1],), (w.shape[0],), dtype=w.dtype)
        self.w = w

    def matvec(self, x: Tensor) -> Tensor:
        return self.w @ x

    def rmatvec(self, y: Tensor) -> Tensor:
        return self.w.T @ y


class Batched(Matrix):
    """The same, for a batch (N, n) alone."""

    def matvec(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.w.T)

    def rmatvec(self, y: Tensor) -> Tensor:
        return torch.mm(y, self.w)


class Bare(LinearOperator):
    """Attributes of its own, any leading dimensions."""

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.in_shape, self.out_shape = (w.shape[1],), (w.shape[0],)
        self.dtype, self.device = w.dtype, w.device

    def matvec(self, x: Tensor) -> Tensor:
        return x @ self.w.T

    def rmatvec(self, y: Tensor) -> Tensor:
        return y @ self.w


MATRICES = [Matrix, Batched, Bare, MatrixOperator]


def random(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def compositions(
    draw: st.DrawFn, shape: tuple[int, int] | None = None, depth: int = 3
) -> tuple[LinearOperator, Tensor]:
    """An operator made of matrices of any class, and its matrix."""
    m, n = shape or (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    kind = draw(st.sampled_from(["leaf", "product", "sum", "difference", "scaled", "negated", "transposed"]))
    if depth == 0 or kind == "leaf":
        w = random(m, n, draw(st.integers(0, 10**6)))
        return draw(st.sampled_from(MATRICES))(w), w
    if kind == "product":
        k = draw(st.integers(1, 7))
        (b, mb), (a, ma) = draw(compositions((m, k), depth - 1)), draw(compositions((k, n), depth - 1))
        return b @ a, mb @ ma
    if kind in ("sum", "difference"):
        (b, mb), (a, ma) = (draw(compositions((m, n), depth - 1)) for _ in range(2))
        return (b + a, mb + ma) if kind == "sum" else (b - a, mb - ma)
    if kind == "transposed":
        a, ma = draw(compositions((n, m), depth - 1))
        return a.T, ma.T
    a, ma = draw(compositions((m, n), depth - 1))
    c = draw(st.sampled_from([2, -0.5, np.float64(3), np.float32(-1.5), torch.tensor(0.25), 1e-3]))
    return (-a, -ma) if kind == "negated" else (c * a, float(c) * ma)


@settings(max_examples=100)
@given(compositions())
def test_compositions_have_the_matrix_of_the_composition(drawn: tuple[LinearOperator, Tensor]) -> None:
    op, matrix = drawn
    scale = 1 + float(matrix.abs().max())
    assert (op.in_shape, op.out_shape) == ((matrix.shape[1],), (matrix.shape[0],))
    torch.testing.assert_close(dense(op), matrix, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(dense(op.T), matrix.T, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(op.to_dense(), matrix, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("cls", MATRICES)
def test_products_of_compositions_take_leading_dimensions(cls: type) -> None:
    w, q = random(4, 4, 1), random(3, 4, 2)
    op = 2 * (cls(q) @ cls(w))
    x, y = (
        torch.randn(2, 4, 4, dtype=torch.float64),
        torch.randn(5, 3, dtype=torch.float64),
    )  # 4 x 4: W @ x would fit too
    torch.testing.assert_close(op.matvec(x), 2 * x @ w.T @ q.T)
    torch.testing.assert_close(op.rmatvec(y), 2 * y @ q @ w)
    torch.testing.assert_close(op.matvec(x[0, 0]), 2 * q @ w @ x[0, 0])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_square_operator_for_one_vector_is_never_given_a_batch(n: int) -> None:
    w = random(n, n, 3)
    assert float(operator_norm(Matrix(w))) == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-5)


@settings(max_examples=60)
@given(cases(max_size=6))
def test_transposed_layers_are_layers(case: Case) -> None:
    op = case.operator()
    adjoint = op.T
    assert (adjoint.in_shape, adjoint.out_shape) == (op.out_shape, op.in_shape)
    torch.testing.assert_close(adjoint.to_dense(), op.to_dense().T, rtol=0, atol=1e-12)
    torch.testing.assert_close(adjoint.T.to_dense(), op.to_dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    a, b = MatrixOperator(random(4, 6, 1, dtype)), MatrixOperator(random(3, 4, 2, dtype))
    op = b @ a
    x = torch.randn(2, 6, dtype=torch.float32)
    assert op.dtype == dtype
    assert op.matvec(x).dtype == torch.promote_types(dtype, torch.float32)
    assert op.matvec(x.to(dtype)).dtype == dtype
    # Halves are multiplied in float32: no rounding between the factors.
    torch.testing.assert_close(
        op.matvec(x).double(), x.double() @ a.weight.double().T @ b.weight.double().T, rtol=1e-5, atol=1e-5
    )
    assert (MatrixOperator(random(3, 4)) @ a).dtype == torch.float64


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        (((3,), (3,)), {}),
        ((torch.ones(3, 2), Geometry()), {}),  # a layer's operator is LayerOperator
        ((), {"weight": torch.ones(3, 2), "geometry": Geometry()}),
        ((), {}),
    ],
)
def test_the_protocol_is_abstract(positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"LinearOperator is abstract.* operator_of.* ConvOperator or MatrixOperator"):
        LinearOperator(*positional, **named)  # type: ignore[abstract]


def test_a_subclass_without_an_adjoint_is_abstract() -> None:
    class Half(LinearOperator):
        def matvec(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TypeError, match=r"Half.*rmatvec"):
        Half((3,), (3,))  # type: ignore[abstract]


def test_shapes_that_do_not_compose() -> None:
    a, b = MatrixOperator(random(4, 6)), MatrixOperator(random(4, 5))
    with pytest.raises(ValueError, match=r"B @ A: outputs of A have shape \(4,\), inputs of B \(5,\)"):
        b @ a
    with pytest.raises(ValueError, match=r"A \+ B: the operators have different shapes"):
        a + b
    with pytest.raises(ValueError, match="must be finite"):
        float("nan") * a
    with pytest.raises(TypeError, match=r"A\.matvec"):
        a @ torch.randn(6)
    with pytest.raises(TypeError):
        a @ np.eye(6)
    with pytest.raises(TypeError):
        a * "2"
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\)"):
        (a + a).matvec(torch.randn(2, 5))


FUNCTIONS = {
    "conv, strided, with bias": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 8)),
    "conv, groups, circular": (nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="circular"), (4, 7, 8)),
    "conv, dilation, reflect": (nn.Conv1d(4, 4, 3, dilation=2, padding=2, padding_mode="reflect"), (4, 7)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), (3, 4, 5)),
    "linear": (nn.Linear(7, 5), (7,)),
    "sequential": (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Upsample(scale_factor=2), nn.Conv1d(3, 2, 3)), (2, 8)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), (2, 6, 5)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 7, 8)),
    "fft": (lambda x: torch.view_as_real(torch.fft.rfft2(x)), (2, 6, 5)),
    "affine": (lambda x: 3 * x.flip(-1) + 7, (5,)),
    "one sample at a time": (lambda x: random(4, 6, 5, torch.float32) @ x, (6,)),
    "one square sample at a time": (lambda x: random(3, 3, 5, torch.float32) @ x, (3,)),
    "without a batch": (lambda x: F.interpolate(x[None], scale_factor=2, mode="bilinear")[0], (2, 3, 4)),
    "constant": (lambda x: 0 * x + 3, (4,)),
    "batch norm": (nn.BatchNorm2d(3).eval(), (3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions(name: str, dtype: torch.dtype) -> None:
    f, shape = FUNCTIONS[name]
    if isinstance(f, nn.Module):
        f = f.to(dtype)
    elif name.startswith("one") and dtype == torch.float64:
        pytest.skip("a float32 matrix")
    op = LinearOperator.from_function(f, shape, dtype=dtype if not isinstance(f, nn.Module) else None)
    single = name.startswith(("one", "without"))
    zero = torch.zeros(1, *shape, dtype=dtype)
    n = zero.numel()
    columns = []
    with torch.no_grad():
        for i in range(n):
            unit = zero.flatten().clone()
            unit[i] = 1
            x = unit.reshape(shape) if single else unit.reshape(1, *shape)
            columns.append((f(x) - f(zero[0] if single else zero)).flatten())
    matrix = torch.stack(columns, 1).double()
    assert op.dtype == dtype
    torch.testing.assert_close(op.to_dense().double(), matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(op.T.to_dense().double(), matrix.T, rtol=1e-4, atol=1e-5)
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    assert float(operator_norm(op)) == pytest.approx(truth, rel=1e-4, abs=1e-12)


def test_a_function_that_takes_batches_and_single_tensors_differently() -> None:
    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)  # the last axis of (C, H, W), the last two of (N, C, H, W)

    with pytest.warns(UserWarning, match="batched=True or False"):
        op = LinearOperator.from_function(upsampled, (2, 3, 4))
    assert op.out_shape == (2, 6, 8)
    assert LinearOperator.from_function(upsampled, (2, 3, 4), batched=True).out_shape == (2, 6, 8)
    assert LinearOperator.from_function(upsampled, (2, 3, 4), batched=False).out_shape == (2, 3, 8)


def test_a_function_in_a_composition() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    pool = LinearOperator.from_function(lambda x: F.avg_pool2d(x, 2), (4, 8, 6), dtype=torch.float64)
    op = pool @ operator_of(conv, (8, 6))
    matrix = pool.to_dense() @ operator_of(conv, (8, 6)).to_dense().detach()
    torch.testing.assert_close(op.to_dense(), matrix.detach())
    assert float(operator_norm(op)) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-5)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (torch.relu, "not linear"),
        (torch.abs, "not linear"),
        (lambda x: x.clamp(-100, 100), "not linear"),
        (lambda x: x * x, "not linear"),
        (torch.round, "not linear|by autograd"),
        (lambda x: x / x.norm(), "NaN|not linear"),
        (F.dropout, "changes from call to call|not linear"),
        (lambda x: x.detach(), "by autograd"),
        (lambda x: x[..., :0], "empty"),
        (lambda x: x @ torch.ones(7, 2), r"does not take inputs of shape \(4,\)"),
        (lambda x: x + float("nan"), "NaN"),
        (lambda x: torch.fft.fft(x), "complex64"),
        (lambda x: (x, x), "returned a tuple"),
    ],
)
def test_functions_that_are_refused(f, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearOperator.from_function(f, (4,))


def test_arguments_of_from_function() -> None:
    with pytest.raises(TypeError, match="f is a Tensor"):
        LinearOperator.from_function(torch.ones(3), (3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_shape="):
        LinearOperator.from_function(torch.neg, (3, 0))
    with pytest.raises(TypeError, match="dtype"):
        LinearOperator.from_function(torch.neg, (3,), dtype=torch.complex64)
    assert LinearOperator.from_function(torch.neg, 3).in_shape == (3,)


def test_a_function_keeps_the_random_state_and_gradients() -> None:
    layer = nn.Linear(4, 3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        op = LinearOperator.from_function(layer, (4,))
        operator_norm(op)
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight.grad is None


def test_conv_operators_compose_with_their_adjoint() -> None:
    op = ConvOperator(torch.randn(3, 2, 3, 3, dtype=torch.float64), (5, 6), padding=1, padding_mode="reflect")
    gram = op.T @ op
    assert float(operator_norm(gram)) == pytest.approx(float(operator_norm(op)) ** 2, rel=1e-5)
