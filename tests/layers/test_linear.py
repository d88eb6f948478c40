"""Operators against PyTorch's own layers, their adjoints, and the exact reductions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import sn_fast
from sn_fast import ConvOperator, MatrixOperator, operator_norm, operator_of

from .geometries import Case, cases

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def dense_norm(op: sn_fast.LinearOperator) -> torch.Tensor:
    return torch.linalg.matrix_norm(op.to_dense().double(), 2)


@settings(max_examples=600)
@given(cases())
def test_matvec_is_the_layer_and_rmatvec_its_adjoint(case: Case) -> None:
    op = case.operator()
    x = torch.randn(2, *op.in_shape, dtype=torch.float64)
    y = torch.randn(2, *op.out_shape, dtype=torch.float64)
    image = op.matvec(x)
    torch.testing.assert_close(image, case.by_torch(x), rtol=1e-12, atol=1e-12)
    back = op.rmatvec(y)
    assert back.shape == x.shape
    error = ((image * y).sum() - (x * back).sum()).abs()
    assert error <= 1e-12 * image.norm() * y.norm() + 1e-300


@settings(max_examples=150)
@given(cases(max_size=6))
def test_reduced_and_unreduced_norms_agree(case: Case) -> None:
    op = case.operator()
    torch.testing.assert_close(dense_norm(op.reduced()), dense_norm(op), rtol=1e-12, atol=1e-12)


@settings(max_examples=150)
@given(cases(max_size=6))
def test_operator_norm_is_the_dense_svd(case: Case) -> None:
    op = case.operator()
    truth = dense_norm(op)
    sigma, u, v = operator_norm(op, return_vectors=True)
    torch.testing.assert_close(sigma, truth, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(operator_norm(op, method="dense"), truth, rtol=1e-12, atol=1e-12)
    assert u.shape == op.out_shape
    assert v.shape == op.in_shape
    if truth > 0:
        torch.testing.assert_close(v.norm(), v.new_ones(()), rtol=1e-10, atol=0)
        torch.testing.assert_close(op.rmatvec(u), sigma * v, rtol=0, atol=2e-5 * float(truth))
        torch.testing.assert_close(op.matvec(v), sigma * u, rtol=0, atol=2e-3 * float(truth))


def test_dense_matrix_has_the_images_of_unit_vectors_as_columns() -> None:
    op = ConvOperator(torch.randn(3, 2, 3, 2), (5, 4), stride=(2, 1), padding=((1, 0), (0, 2)))
    dense = op.to_dense()
    for i in range(dense.shape[1]):
        unit = torch.zeros(dense.shape[1])
        unit[i] = 1
        torch.testing.assert_close(dense[:, i], op.matvec(unit.reshape(op.in_shape)).flatten())


@pytest.mark.parametrize(
    ("shape", "size", "options", "small"),
    [
        ((6, 4, 1, 1), (7, 7), {}, (4, 1, 1)),
        ((6, 4, 1, 1), (7, 5), {"stride": 2}, (4, 1, 1)),
        ((5, 3, 4, 4), (16, 16), {"stride": 4}, (3, 4, 4)),  # patch embedding
        ((5, 3, 2, 3), (9, 8), {"stride": (2, 1)}, (3, 2, 8)),  # one axis of two
        ((5, 3, 2, 2), (9, 9), {"stride": 3, "dilation": 2}, (3, 2, 2)),
        ((5, 3, 3, 3), (9, 9), {"stride": 3, "padding": 1}, (3, 3, 3)),
        ((5, 3, 6, 7), (6, 7), {}, (3, 6, 7)),  # kernel == input: already a matrix
        ((8, 2, 1, 1), (6, 6), {"groups": 4}, (8, 1, 1)),
        ((4, 3, 1), (9,), {"transposed": True, "stride": 2}, (4, 1)),
    ],
)
def test_reduction_finds_the_small_operator(shape, size, options, small) -> None:
    op = ConvOperator(torch.randn(shape, dtype=torch.float64), size, **options)
    assert op.reduced().in_shape == small
    torch.testing.assert_close(dense_norm(op.reduced()), dense_norm(op), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((5, 3, 3, 3), (9, 9), {"stride": 2}),  # windows overlap
        ((5, 3, 2, 2), (2, 2), {"stride": 2, "padding": 1}),  # no output sees every tap
        ((5, 3, 2), (4,), {"stride": 2, "padding": 1, "padding_mode": "circular"}),  # the border is read twice
    ],
)
def test_no_reduction_where_it_would_be_wrong(shape, size, options) -> None:
    op = ConvOperator(torch.randn(shape, dtype=torch.float64), size, **options)
    assert op.reduced().geometry == op.geometry


@settings(max_examples=100)
@given(cases())
def test_index_tables_are_what_padding_reads(case: Case) -> None:
    """``Axis.position``, which the reductions (and kernels) go by, against F.pad of numbered inputs."""
    geometry = case.operator().geometry
    for axis in geometry.axes:
        numbered = torch.arange(1.0, axis.size + 1)[None, None]
        before, after = max(axis.before, 0), max(axis.after, 0)
        mode = "constant" if geometry.mode == "zeros" else geometry.mode
        padded = torch.nn.functional.pad(numbered, (before, after), mode=mode)[0, 0]
        for o in range(axis.out):
            read = [padded[o * axis.stride + t * axis.dilation] for t in range(axis.kernel)]
            assert axis.window(o, geometry.mode) == [int(p) - 1 if p > 0 else None for p in read]


def test_groups_are_independent_operators_with_the_largest_norm() -> None:
    weight = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    whole = ConvOperator(weight, (6, 6), stride=2, padding=1, groups=4)
    parts = [ConvOperator(w, (6, 6), stride=2, padding=1) for w in weight.chunk(4)]
    torch.testing.assert_close(operator_norm(whole), max(map(operator_norm, parts)), rtol=1e-8, atol=0)


def test_transposed_convolution_has_the_norm_of_the_convolution() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    conv = ConvOperator(weight, (9, 8), stride=2, padding=1)
    transposed = ConvOperator(weight, conv.out_shape[1:], stride=2, padding=1, transposed=True, output_padding=(0, 1))
    assert transposed.out_shape == conv.in_shape
    torch.testing.assert_close(operator_norm(transposed), operator_norm(conv), rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_precision(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 3, 3, 3)
    op, exact = (ConvOperator(w, (8, 8), stride=2, padding=1) for w in (weight.to(dtype), weight.to(dtype).double()))
    x = torch.randn(2, 3, 8, 8).to(dtype)
    assert op.matvec(x).dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(op.matvec(x).double(), exact.matvec(x.double()), rtol=4 * eps, atol=20 * eps)
    assert operator_norm(op).dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(operator_norm(op).double(), operator_norm(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), padding="same"),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="circular"),
        nn.Conv2d(4, 4, 4, padding="same", groups=4),
        nn.Conv3d(4, 2, 2, stride=2),
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 3), output_padding=(0, 2), groups=2),
        nn.ConvTranspose3d(4, 2, 2, stride=2, dilation=2, output_padding=1),
        nn.Linear(7, 5),
    ],
    ids=lambda m: type(m).__name__,
)
def test_operator_of_a_layer_is_the_layer_without_bias(module: nn.Module) -> None:
    module = module.double()
    module.bias = None
    if isinstance(module, nn.Linear):
        op = operator_of(module)
    else:
        n = module.weight.ndim - 2
        op = operator_of(module, (6, 7, 5)[:n])
    x = torch.randn(3, *op.in_shape, dtype=torch.float64)
    torch.testing.assert_close(op.matvec(x), module(x), rtol=1e-12, atol=1e-12)


def test_embedding_maps_a_one_hot_vector_to_its_row() -> None:
    embedding = nn.Embedding(10, 4)
    op = operator_of(embedding)
    one_hot = torch.nn.functional.one_hot(torch.tensor([3, 7]), 10).float()
    torch.testing.assert_close(op.matvec(one_hot), embedding(torch.tensor([3, 7])))


def test_operator_of_normalised_layer_knows_its_size_raw_and_in_use() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    truth = operator_norm(operator_of(conv, (8, 8)))
    sn_fast.spectral_norm(conv, input_size=(8, 8), beta=0.5)
    torch.testing.assert_close(operator_norm(operator_of(conv, raw=True)), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(operator_norm(operator_of(conv)), torch.tensor(0.5), rtol=1e-3, atol=0)


def test_leading_batch_dimensions_and_gradients() -> None:
    op = MatrixOperator(torch.randn(3, 4, requires_grad=True))
    assert op.matvec(torch.randn(2, 5, 4)).shape == (2, 5, 3)
    assert op.rmatvec(torch.randn(3)).shape == (4,)
    op.matvec(torch.randn(4)).sum().backward()
    assert op.weight.grad is not None


W = torch.randn(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ConvOperator(W, (8,)), "input_size=(8,)"),
        (lambda: ConvOperator(W, (0, 8)), "input_size=(0, 8)"),
        (lambda: ConvOperator(W, (8, 8), stride=0), "stride=0"),
        (lambda: ConvOperator(W, (8, 8), padding=-1), "padding=-1"),
        (lambda: ConvOperator(W, (8, 8), padding="full"), "padding='full'"),
        (lambda: ConvOperator(W, (8, 8), padding="same", stride=2), "(before, after) pairs"),
        (lambda: ConvOperator(W, (8, 8), padding_mode="mirror"), "padding_mode='mirror'"),
        (lambda: ConvOperator(W, (2, 8), padding=2, padding_mode="reflect"), "too large for padding_mode='reflect'"),
        (lambda: ConvOperator(W, (2, 2)), "does not fit"),
        (lambda: ConvOperator(W, (8, 8), groups=3), "groups=3"),
        (lambda: ConvOperator(W, (8, 8), output_padding=1), "transposed=True"),
        (lambda: ConvOperator(W, (8, 8), transposed=True, output_padding=1), "output_padding=1"),
        (lambda: ConvOperator(W, (8, 8), transposed=True, padding_mode="reflect"), "use 'zeros'"),
        (lambda: ConvOperator(W[0, 0], (8, 8)), "weight has shape (3, 3)"),
        (lambda: ConvOperator(W[:0], (8, 8)), "empty"),
        (lambda: MatrixOperator(W), "expected 2 dimensions"),
        (lambda: MatrixOperator(torch.ones(2, 2, dtype=torch.int64)), "torch.int64"),
        (lambda: MatrixOperator(torch.randn(3, 4)).matvec(torch.randn(3)), "x has shape (3,)"),
        (lambda: MatrixOperator(torch.randn(3, 4)).matvec(torch.ones(4, dtype=torch.int64)), "x has dtype"),
        (lambda: operator_of(nn.Conv2d(2, 4, 3)), "input_size=(32, 32)"),
        (lambda: operator_of(nn.ReLU()), "ReLU has no weight"),
    ],
)
def test_bad_input_names_the_argument(call, says) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert says in str(error.value)
