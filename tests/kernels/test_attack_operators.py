"""The operators of the attacks' updates while kernels serve them: contracts, dtypes, errors, large offsets."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from sn_fast.ops import pgd_step as pgd_ops
from sn_fast.ops import random_start as start_ops
from sn_fast.ops import wrm_step as wrm_ops
from sn_fast.reference import pgd_step as pgd_reference
from sn_fast.reference import wrm_step as wrm_reference

from ..attacks.models import same_bits
from .test_attack_updates import NORMS, SHAPE, batch, laid_out


def operator_calls(dtype: torch.dtype) -> list[tuple]:
    x_adv, x, grad = (t.to(dtype) for t in batch())
    eps, bound = torch.rand(3), torch.zeros(3, 1, 1)
    active = torch.tensor([True, False, True])
    last, sparse = laid_out(x_adv, "channels_last"), laid_out(x_adv, "sparse")
    seed = torch.tensor(5)
    return [
        *((pgd_ops.pgd_step, (x_adv, x, grad, n, 0.1, 0.2, *[None] * 4, False, None)) for n in NORMS),
        (pgd_ops.pgd_step, (last, x, grad, "2", 0.0, 0.0, eps, eps, bound, None, True, active)),
        (
            pgd_ops.pgd_step,
            (sparse, x, grad, "inf", math.inf, 0.1, None, None, x.float() - 1, x.float() + 1, False, None),
        ),
        (wrm_ops.wrm_step, (last, x, grad, 0.1, None, 0.5, bound, bound + 1)),
        (wrm_ops.wrm_step, (laid_out(x_adv, "batch_fastest"), x, grad, 0.0, eps, 1.0, None, None)),
        *((pgd_ops.project, (last, x, n, 0.1, None, None, bound)) for n in NORMS),
        *((start_ops.random_start, (last, n, 0.1, None, None, bound, seed)) for n in NORMS),
        (start_ops.random_start, (sparse, "2", 0.1, eps, None, None, seed)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_operators_pass_opcheck(kernels: ModuleType, dtype: torch.dtype) -> None:
    for op, args in operator_calls(dtype):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("norm", NORMS)
def test_empty_and_single_batches(kernels: ModuleType, norm: str) -> None:
    for n in (0, 1):
        x_adv, x, grad = (t[:n].float() for t in batch())
        assert pgd_ops.pgd_step(x_adv, x, grad, norm, 0.1, 0.1, *[None] * 4, False, None).shape == x.shape
        assert pgd_ops.project(x_adv, x, norm, 0.1, None, None, None).shape == x.shape
        assert wrm_ops.wrm_step(x_adv, x, grad, 0.1, None, 0.1, None, None).shape == x.shape
        assert start_ops.random_start(x, norm, 0.1, None, None, None, torch.tensor(1)).shape == x.shape


def test_float64_goes_to_the_reference(kernels: ModuleType) -> None:
    for dtypes in ((torch.float64,) * 3, (torch.float32, torch.float32, torch.float64)):
        tensors = tuple(t.to(d) for t, d in zip(batch(), dtypes, strict=True))
        for norm in NORMS:
            args = (*tensors, norm, 0.1, 0.2, *[None] * 4, False, None)
            assert same_bits(pgd_ops.pgd_step(*args), pgd_reference.pgd_step(*args))
        args = (*tensors, 0.1, None, 0.5, None, None)
        assert same_bits(wrm_ops.wrm_step(*args), wrm_reference.wrm_step(*args))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(3, 3)}, ValueError, r"grad has shape \(3, 3\)"),
        ({"x_adv": torch.zeros(SHAPE, device="meta")}, ValueError, r"x_adv is on meta.*x_adv.to\(x.device\)"),
        ({"lower": torch.zeros((), device="meta")}, ValueError, "lower is on meta"),
        ({"upper": torch.zeros(5)}, ValueError, "upper of shape"),
        ({"eps_per_sample": torch.zeros(4)}, ValueError, "eps_per_sample has shape"),
        ({"active": torch.zeros(3)}, TypeError, r"active.bool\(\)"),
        ({"norm": "3"}, ValueError, "norm='3' is unknown"),
    ],
)
def test_what_kernels_refuse(kernels: ModuleType, change: dict, error: type[Exception], message: str) -> None:
    x_adv, x, grad = (t.float() for t in batch())
    names = ("eps_per_sample", "alpha_per_sample", "lower", "upper", "active")
    arguments = dict.fromkeys(names) | {"x_adv": x_adv, "x": x, "grad": grad, "norm": "2", "eps": 0.1, "alpha": 0.1}
    with pytest.raises(error, match=message):
        pgd_ops._pgd_step_kernel(kernels, **(arguments | {"targeted": False} | change))


def test_samples_far_apart(kernels: ModuleType) -> None:
    """Offsets beyond 2^31 elements. Only the pages that are touched exist."""
    try:
        storage = torch.empty(2**31 + 40, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    x_adv, x, grad = (t.half() for t in batch((2, 16)))
    far = storage.as_strided((2, 16), (2**31 + 8, 1)).copy_(x_adv)
    for norm in NORMS:
        rest = (x, grad, norm, 0.1, 0.2, *[None] * 4, False, None)
        assert same_bits(pgd_ops.pgd_step(far, *rest), pgd_ops.pgd_step(x_adv, *rest))
