"""The Lanczos start by kernels: the best that the Krylov space holds, in every group of every operator."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from sn_fast import ConvOperator, MatrixOperator
from sn_fast.layers import LayerOperator
from sn_fast.norms.estimate import start_vectors
from sn_fast.ops import lanczos as ops
from sn_fast.ops import plan, power_step
from sn_fast.reference import lanczos
from sn_fast.reference.lanczos import lanczos_start as reference

from ..layers.geometries import Case, cases


def start_of(op: LayerOperator, seed: int = 0) -> Tensor:
    """Where the iteration of a convolution or a matrix starts."""
    return torch.randn(op.in_shape if op.geometry.axes else op.out_shape, generator=torch.Generator().manual_seed(seed))


def run(operators: list[LayerOperator], n: int, function=ops.lanczos_start) -> tuple[list[Tensor], list[Tensor]]:
    code = [c for op in operators for c in op.geometry.encode()]
    return function([op.weight for op in operators], [start_of(op) for op in operators], code, n)


def blocks(op: LayerOperator) -> Tensor:
    """The dense matrices of the groups, (groups, m, n), in float64."""
    exact = LayerOperator(op.weight.double(), op.geometry)
    g = op.geometry.groups
    dense = exact.to_dense().reshape(g, math.prod(op.out_shape) // g, g, -1)
    return torch.stack([dense[i, :, i, :] for i in range(g)])


def best_in_krylov_space(matrix: Tensor, start: Tensor, n: int) -> float:
    """The norm of ``matrix`` on the span of (A^T A)^j start, j < n."""
    basis: list[Tensor] = []
    direction = start.double()
    for _ in range(min(n, len(start))):
        for _ in range(2):
            for b in basis:
                direction = direction - (b @ direction) * b
        length = direction.norm()
        if length <= 1e-9 * (matrix.norm() ** 2 if basis else 1.0):
            break
        basis.append(direction / length)
        direction = matrix.T @ (matrix @ basis[-1])
    return float(torch.linalg.matrix_norm(matrix @ torch.stack(basis, dim=1), 2))


def check(op: LayerOperator, u: Tensor, v: Tensor, n: int, tolerance: float = 2e-5) -> None:
    """Unit vectors of every group whose <u, A v> is what the Krylov space allows, no more and no less."""
    assert u.shape == op.out_shape
    assert v.shape == op.in_shape
    g = op.geometry.groups
    us, vs, starts = (x.double().reshape(g, -1) for x in (u, v, start_of(op)))
    for matrix, u_, v_, start in zip(blocks(op), us, vs, starts):
        assert u_.norm() == pytest.approx(1, abs=1e-5)
        assert v_.norm() == pytest.approx(1, abs=1e-5)
        # A matrix starts on the side of u, and so is its transpose from there.
        best = best_in_krylov_space(matrix if op.geometry.axes else matrix.T, start, n)
        assert float(u_ @ matrix @ v_) == pytest.approx(best, rel=tolerance, abs=1e-30)


OPERATORS = {
    "strided": lambda: ConvOperator(torch.randn(9, 5, 3, 3), (8, 7), stride=2, padding=1),
    "depthwise": lambda: ConvOperator(torch.randn(6, 1, 3, 3), (6, 6), padding=1, groups=6),
    "groups": lambda: ConvOperator(torch.randn(8, 3, 3), (9,), padding=2, groups=2, padding_mode="replicate"),
    "transposed": lambda: ConvOperator(torch.randn(6, 5, 4, 4), (3, 3), stride=2, padding=1, transposed=True),
    "3d": lambda: ConvOperator(torch.randn(4, 3, 2, 2, 2), (3, 4, 3)),
    "matrix": lambda: MatrixOperator(torch.randn(40, 70)),
    "tall matrix": lambda: MatrixOperator(torch.randn(70, 5)),
}


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", OPERATORS)
def test_best_in_the_krylov_space(ordered_kernels: ModuleType, name: str, n: int) -> None:
    op = OPERATORS[name]()
    (u,), (v,) = run([op], n)
    check(op, u, v, n)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_reference_is_the_best_too(name: str, n: int) -> None:
    op = OPERATORS[name]()
    (u,), (v,) = run([op], n, reference)
    check(op, u, v, 7 if name == "tall matrix" else n)  # exact, as after more steps than it has columns


def test_long_matrices_are_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would take several copies of an embedding table."""
    monkeypatch.setattr(lanczos, "_decomposed", None)
    w = torch.randn(1 << 15, 5)
    (u,), (v,) = reference([w], [torch.randn(1 << 15)], MatrixOperator(w).geometry.encode(), 15)
    exact = torch.linalg.matrix_norm(w.double(), 2)
    torch.testing.assert_close(u.double() @ w.double() @ v.double(), exact, rtol=1e-5, atol=0)


def test_small_matrices_together() -> None:
    """Many in one decomposition: each has its own exact vectors; zero and not finite ones have equal unit vectors."""
    shapes = [(8, 8), (8, 8), (3, 70), (70, 3), (8, 8), (1, 1), (32, 32), (8, 8)]
    weights = [torch.randn(shape) for shape in shapes]
    weights[1] *= 1e-30
    weights[4].zero_()
    weights[7][2, 3] = torch.nan
    starts = [torch.randn(w.shape[0]) for w in weights]
    us, vs = reference(weights, starts, [c for w in weights for c in MatrixOperator(w).geometry.encode()], 1)
    for i, (w, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        assert (u.shape, v.shape) == (w.shape[:1], w.shape[1:])
        if i in (4, 7):
            assert torch.equal(u, torch.full_like(u, 8**-0.5)), i
            continue
        exact = torch.linalg.matrix_norm(w.double(), 2)
        torch.testing.assert_close(u.double() @ w.double() @ v.double(), exact, rtol=1e-6, atol=0)


@given(case=cases(max_size=6))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_geometry(kernels: ModuleType, case: Case) -> None:
    op = case.operator(torch.float32)
    for operator in (op, op.reduced()):
        (u,), (v,) = run([operator], 3)
        check(operator, u, v, 3, tolerance=1e-4)


def test_all_operators_in_one_call(kernels: ModuleType) -> None:
    operators = [make() for make in OPERATORS.values()]
    us, vs = run(operators, 4)
    for i, op in enumerate(operators):
        (u,), (v,) = run([op], 4)
        torch.testing.assert_close(us[i], u, rtol=0, atol=1e-5)  # sums may be split elsewhere
        torch.testing.assert_close(vs[i], v, rtol=0, atol=1e-5)
        check(op, us[i], vs[i], 4)


@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_on_repeat_and_in_every_thread_order(kernels: ModuleType, name: str) -> None:
    op = OPERATORS[name]()
    first = run([op], 5)
    for order in range(4):
        kernels.set_thread_order(order)
        for a, b in zip(first, run([op], 5)):
            assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_vectors_in_many_parts(ordered_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Several blocks to a vector, of which there is one here otherwise: the same vectors, up to the last bits."""
    op = OPERATORS[name]()
    whole = run([op], 5)
    for piece, most in ((1, 7), (5, 256), (17, 3)):
        monkeypatch.setattr(plan, "_PIECE", piece)
        monkeypatch.setattr(plan, "_MOST_PARTS", most)
        power_step._plans.cache_clear()
        (u,), (v,) = run([op], 5)
        check(op, u, v, 5)
        torch.testing.assert_close(u, whole[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(v, whole[1][0], rtol=0, atol=1e-5)
    power_step._plans.cache_clear()


@pytest.mark.parametrize("length", [4095, 4096, 4097, 20_001])
def test_long_vectors(kernels: ModuleType, length: int) -> None:
    """<u, A v> of every group, where the vectors themselves are badly determined."""
    depthwise = ConvOperator(torch.randn(2, 1, 3), (length,), padding=1, groups=2)
    for op in (MatrixOperator(torch.randn(3, length)), depthwise):
        exact = LayerOperator(op.weight.double(), op.geometry)
        (u,), (v,) = run([op], 3)
        (u_wanted,), (v_wanted,) = reference([exact.weight], [start_of(op).double()], op.geometry.encode(), 3)
        groups = op.geometry.groups
        values, wanted = (
            (a.double() * exact.matvec(b.double())).reshape(groups, -1).sum(1)
            for a, b in ((u, v), (u_wanted, v_wanted))
        )
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(v.reshape(groups, -1).norm(dim=1), torch.ones(groups), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(kernels: ModuleType, dtype: torch.dtype) -> None:
    op = ConvOperator(torch.randn(9, 5, 3, 3).to(dtype), (8, 7), stride=2, padding=1)
    (u,), (v,) = run([op], 4)
    assert u.dtype == v.dtype == torch.float32
    check(op, u, v, 4)


def test_fifteen_steps_are_close_to_the_norm(kernels: ModuleType) -> None:
    op = ConvOperator(torch.randn(16, 8, 3, 3), (10, 10), padding=1)
    u, v = start_vectors(op, 15)
    value = float(u.double().reshape(-1) @ blocks(op)[0] @ v.double().reshape(-1))
    assert 1 - value / float(torch.linalg.matrix_norm(blocks(op)[0], 2)) < 0.02


@pytest.mark.parametrize("n", [15, 32])
def test_an_exhausted_space_gives_the_norm_itself(kernels: ModuleType, n: int) -> None:
    """More steps than the space has dimensions; rank one; equal singular values."""
    rank_one = torch.outer(torch.randn(6), torch.randn(9))
    for weight in (torch.randn(3, 40), torch.randn(40, 3), rank_one, torch.eye(7), torch.randn(1, 1)):
        op = MatrixOperator(weight)
        (u,), (v,) = run([op], n)
        truth = float(torch.linalg.matrix_norm(weight.double(), 2))
        assert float(u.double() @ weight.double() @ v.double()) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_scales_of_weights(kernels: ModuleType, scale: float) -> None:
    for name in ("strided", "matrix"):
        op = OPERATORS[name]()
        op = LayerOperator((op.weight * scale).contiguous(), op.geometry)
        (u,), (v,) = run([op], 4)
        check(op, u, v, 4, tolerance=1e-4 if scale > 1e-38 else 1e-2)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_non_finite_groups_get_equal_elements(kernels: ModuleType, value: float) -> None:
    weight = torch.randn(6, 1, 3)
    weight[2] = value
    op = ConvOperator(weight, (7,), padding=1, groups=6)
    for function in (ops.lanczos_start, reference):
        (u,), (v,) = run([op], 3, function)
        assert torch.allclose(u[2], torch.full((7,), 7**-0.5))
        assert torch.allclose(v[2], torch.full((7,), 7**-0.5))
        assert u.isfinite().all()
        assert v.isfinite().all()
        others = [i for i in range(6) if i != 2]
        rest = ConvOperator(weight[others], (7,), padding=1, groups=5)
        start = start_of(op)[others]
        (u_alone,), (_,) = ops.lanczos_start([rest.weight], [start], rest.geometry.encode(), 3)
        assert torch.allclose((u[others] * u_alone).sum(1).abs(), torch.ones(5), atol=1e-5)


def test_what_the_kernels_do_not_take_goes_to_the_reference(kernels: ModuleType) -> None:
    wide = MatrixOperator(torch.randn(20, 30, dtype=torch.float64))
    start = [start_of(wide).double()]
    (u,), (v,) = ops.lanczos_start([wide.weight], start, wide.geometry.encode(), 4)
    assert u.dtype == v.dtype == torch.float64
    many = MatrixOperator(torch.randn(40, 50))
    (u,), (v,) = run([many], 33)  # more vectors than a block combines
    assert float(u @ many.weight @ v) == pytest.approx(float(torch.linalg.matrix_norm(many.weight, 2)), rel=1e-4)


def test_wrong_arguments_are_named(kernels: ModuleType) -> None:
    op = OPERATORS["strided"]()
    code, start = op.geometry.encode(), start_of(op)
    for arguments, says in (
        (([op.weight], [start[:1]], code, 3), r"lanczos_start: start has shape \(1, 8, 7\), the operator needs"),
        (([op.weight], [], code, 3), "lanczos_start: 0 vectors start for 1 weights"),
        (([op.weight], [start], code, 0), "n_iterations=0 must be >= 1"),
        (([op.weight, op.weight], [start, start], code, 3), "2 weights for 1 geometries"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.lanczos_start(*arguments)


def test_opcheck(kernels: ModuleType) -> None:
    operators = [OPERATORS["groups"](), OPERATORS["matrix"](), OPERATORS["transposed"]()]
    code = [c for op in operators for c in op.geometry.encode()]
    weights, starts = [op.weight for op in operators], [start_of(op) for op in operators]
    torch.library.opcheck(ops.lanczos_start, (weights, starts, code, 3))
