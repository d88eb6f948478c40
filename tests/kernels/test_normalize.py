"""The kernel of normalisation, on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sn_fast.reference import normalize as reference

from ..on_device import DEVICE
from .conftest import THREAD_ORDERS
from .small_operators import DTYPES, drawn
from .weight_gradients import INF, NAN, above, same


def expected(weight: Tensor, sigma: float, beta: float, cap: bool) -> Tensor:
    """In float32: one division for the divisor, one per element."""
    ratio = torch.tensor(sigma) / torch.tensor(beta)
    divisor = torch.ones(()) if (cap and ratio <= 1) or (not cap and sigma == 0) else ratio
    return (weight.float() / divisor).to(weight.dtype)


def check_normalize(
    weights: Sequence[Tensor], sigmas: Sequence[float], betas: Sequence[float], caps: Sequence[bool]
) -> list[Tensor]:
    before = [w.clone() for w in weights]
    tensors = [torch.tensor(s) for s in sigmas]
    found = torch.ops.sn_fast.normalize(list(weights), tensors, list(betas), list(caps))
    assert len(found) == len(weights)
    places = [w.clone() for w in weights]
    torch.ops.sn_fast.normalize_(places, tensors, list(betas), list(caps))
    assert all(map(same, places, found))
    for w, old, s, beta, cap, result in zip(weights, before, sigmas, betas, caps, found):
        assert same(w, old)
        assert same(result, expected(w, s, beta, cap))
        if DEVICE.type == "cpu":  # on a GPU, PyTorch divides sigma by beta through a reciprocal
            assert same(result, reference.normalize(w, torch.tensor(s), beta, cap))
        assert result.stride() == torch.empty_like(w).stride()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigma_below_at_and_above_beta(kernels: ModuleType, dtype: torch.dtype) -> None:
    weight = torch.randn(37, 29).to(dtype)
    pairs = [
        *((s, b) for b in (0.3, 0.7, 1.0, 3.0) for s in (b / 3, -above(-b), b, above(b), above(above(b)), 50 * b)),
        *((s, b) for b in (0.7, INF) for s in (0.0, 1e-45, 1e-38, 1e38, INF, NAN)),
        *((s, b) for b in (1e-30, 1e30) for s in (1e-30, 1.0, 1e30)),
    ]
    for cap in (True, False):
        usable = [(s, b) for s, b in pairs if cap or b < INF]
        check_normalize([weight] * len(usable), *zip(*usable), [cap] * len(usable))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_cut_keeps_every_bit(kernels: ModuleType, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 90).to(dtype)
    for sigma, beta, cap in ((0.5, 0.7, True), (0.7, 0.7, True), (5.0, INF, True), (0.0, 0.7, True), (0.0, 0.7, False)):
        assert same(check_normalize([weight], [sigma], [beta], [cap])[0], weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_elements(kernels: ModuleType, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    special = [0.0, -0.0, INF, -INF, NAN, info.max, -info.max, info.tiny, info.tiny / 2, info.tiny * info.eps]
    weight = torch.tensor(special, dtype=dtype).repeat(900)
    for sigma in (0.5, 1.7, 1e-3, INF):
        for cap in (True, False):
            check_normalize([weight], [sigma], [0.7], [cap])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Around the ends of vectors and blocks, in one launch and each alone."""
    sizes = (1, 2, 3, 4, 5, 7, 8, 9, 4095, 4096, 4097, 8191, 8192, 8193, 12289, 16384)
    weights = [torch.randn(n, 1).to(dtype) for n in sizes]
    sigmas = [1.0 + 0.1 * i for i in range(len(sizes))]
    check_normalize(weights, sigmas, [0.7] * len(sizes), [True] * len(sizes))
    for weight in weights:
        check_normalize([weight], [1.3], [0.7], [False])


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_of_storage(kernels: ModuleType, dtype: torch.dtype) -> None:
    memory = torch.randn(20000).to(dtype)
    for offset in range(1, 10):
        for count in (5, 4096, 8192 + offset):
            check_normalize([memory[offset : offset + count].reshape(-1, 1)], [1.3], [0.7], [True])


@pytest.mark.parametrize("n", [75, 76, 77, 152, 153])
def test_more_weights_than_one_launch_takes(kernels: ModuleType, n: int) -> None:
    """Each with its own sigma, beta, mode, dtype and number of blocks."""
    weights = [torch.randn(1 + 1000 * (i % 7 == 0) * (i % 5), 1 + i % 11).to(DTYPES[i % 3]) for i in range(n)]
    sigmas, betas = [0.5 + 0.1 * i for i in range(n)], [0.3 + 0.2 * (i % 9) for i in range(n)]
    check_normalize(weights, sigmas, betas, [i % 4 > 0 for i in range(n)])


def test_a_large_weight_among_small_ones(kernels: ModuleType) -> None:
    weights = [torch.randn(2, 2), torch.randn(0, 3), torch.randn(500, 301), torch.randn(1, 1), torch.randn(0, 3)]
    check_normalize(weights, [1.0, 2.0, 3.0, 4.0, 5.0], [0.5] * 5, [True, True, False, True, True])


def test_no_weights(kernels: ModuleType) -> None:
    assert list(torch.ops.sn_fast.normalize([], [], [], [])) == []


def views(dtype: torch.dtype) -> list[Tensor]:
    """Dense and not, each laid out in another way."""
    kernel = torch.randn(6, 8, 3, 2).to(dtype)
    volume = torch.randn(4, 3, 2, 5, 3).to(dtype)
    matrix = torch.randn(70, 90).to(dtype)
    return [
        kernel.contiguous(memory_format=torch.channels_last),
        volume.contiguous(memory_format=torch.channels_last_3d),
        matrix.T,
        kernel.permute(2, 0, 3, 1),
        kernel.transpose(0, 1),
        matrix[:, 3:80],
        matrix[::2],
        matrix.T[::3],
        matrix[:, ::2].T,
        kernel.contiguous(memory_format=torch.channels_last)[:, :5],
        kernel[..., :1],
        matrix[:1].expand(70, 90),
        matrix[:, :1].expand(70, 90),
        matrix[0, 0].expand(70, 90),
        matrix.as_strided((40, 40), (1, 1)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_weights(kernels: ModuleType, dtype: torch.dtype) -> None:
    weights = views(dtype)
    check_normalize(weights, [1.3] * len(weights), [0.7] * len(weights), [True] * len(weights))
    for weight in weights:
        check_normalize([weight], [0.3], [0.7], [True])


def test_float64_goes_to_the_reference(kernels: ModuleType) -> None:
    """Also among others, and where sigma alone is float64."""
    weights = [torch.randn(5, 6, dtype=d) for d in (torch.float32, torch.float64, torch.float16, torch.float32)]
    sigmas = [torch.tensor(1.3, dtype=d) for d in (torch.float32, torch.float64, torch.float32, torch.float64)]
    found = torch.ops.sn_fast.normalize(weights, sigmas, [0.7] * 4, [True] * 4)
    for result, wanted in zip(found, reference.normalize_all(weights, sigmas, [0.7] * 4, [True] * 4)):
        assert same(result, wanted)


@drawn(60)
@given(
    seed=st.integers(0, 2**31),
    order=st.sampled_from(THREAD_ORDERS),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    values=st.lists(st.floats(0.0, 2.0**100, width=32), min_size=12, max_size=12),
    cap=st.booleans(),
)
def test_any_weights(
    kernels: ModuleType, seed: int, order: int, sizes: list[int], values: list[float], cap: bool
) -> None:
    kernels.set_thread_order(order)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, 1, generator=generator).to(DTYPES[(seed + n) % 3]) for n in sizes]
    betas = [max(b, 1e-30) for b in values[6:]]
    check_normalize(weights, values[: len(sizes)], betas[: len(sizes)], [cap] * len(sizes))


def test_in_place_where_weights_are_no_block_of_memory(kernels: ModuleType) -> None:
    """Slices, transposed and channels-last weights, float64: each is written where it is, and nothing beside it."""
    large = torch.randn(8, 14)
    weights = [large[:, 1::2], torch.randn(5, 7).T, torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last)]
    weights += [torch.randn(4, 4, dtype=torch.float64), torch.randn(3, 3)]
    sigmas = [torch.tensor(s) for s in (2.0, 3.0, 0.5, 4.0, 8.0)]
    rest, versions = large[:, ::2].clone(), [w._version for w in weights]
    caps = [True, False, True, True, True]
    wanted = [reference.normalize(w, s, 1.0, cap) for w, s, cap in zip(weights, sigmas, caps)]
    torch.ops.sn_fast.normalize_(weights, sigmas, [1.0] * 5, caps)
    for w, value in zip(weights, wanted):
        assert torch.equal(w, value)
    assert torch.equal(large[:, ::2], rest)
    assert all(w._version > before for w, before in zip(weights, versions))
