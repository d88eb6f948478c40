"""random_start: the generator's known answers, its reference, layouts, distributions, seeds."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sn_fast.attacks import random_start
from sn_fast.ops import random_start as start_ops
from sn_fast.reference import random_start as reference

from ..attacks.models import same_bits
from ..on_device import DEVICE
from .test_attack_updates import DTYPES, LAYOUTS, NORMS, SHAPE, laid_out, norm_of, ulp
from .whole_models import plain_pytorch

# Random123 (Salmon et al. 2011), kat_vectors: philox4x32, 10 rounds.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "drawn"), KNOWN)
def test_philox_known_answers(module: ModuleType, counter: list[int], key: list[int], drawn: list[int]) -> None:
    assert module.philox(counter, key) == drawn
    words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore
    assert [int(w) for w in words] == drawn


def start(x: Tensor, norm: str, eps: float = 0.5, seed: int = 2**40 + 17, **options: Tensor | None) -> Tensor:
    options = {"eps_per_sample": None, "lower": None, "upper": None} | options
    return start_ops.random_start(x, norm, eps, *options.values(), torch.tensor(seed))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPE, (2, 1), (5, 33), (2, 3001)])
def test_equals_its_reference(
    ordered_kernels: ModuleType, norm: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape).to(dtype)
    eps = torch.linspace(0, 2, shape[0])
    for options in ({}, {"eps_per_sample": eps, "upper": torch.tensor(0.3), "lower": x[:1].float() - 0.1}):
        found = start(x, norm, **options)
        args = {"eps_per_sample": None, "lower": None, "upper": None} | options
        wanted = reference.random_start(x.double(), norm, 0.5, *args.values(), torch.tensor(2**40 + 17))
        assert ((found.double() - wanted).abs() <= 3e-6 + ulp(wanted, dtype)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_equal_values_for_every_layout(kernels: ModuleType, norm: str) -> None:
    x = torch.randn(SHAPE)
    wanted = start(x, norm)
    for layout in {name for names in LAYOUTS for name in names}:
        t = laid_out(x, layout)
        found = start(t, norm)
        assert found.stride() == torch.empty_like(t).stride()
        assert same_bits(found, wanted), layout
    permuted = torch.randn(2, 2, 3, 4, 5).permute(0, 3, 1, 4, 2)
    assert same_bits(start(permuted, norm), start(permuted.contiguous(), norm))


@pytest.mark.parametrize("norm", NORMS)
def test_is_uniform_in_the_ball(kernels: ModuleType, norm: str) -> None:
    """Radius^D is uniform; directions are symmetric and alike in every coordinate."""
    n, d, eps = 900, 3, 2.0
    delta = start(torch.zeros(n, d), norm, eps).double()
    radius = norm_of(delta, norm) / eps
    assert radius.max() <= 1 + 1e-6
    volume = (radius**d).sort().values
    assert (volume - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / math.sqrt(n)  # Kolmogorov, 1 %
    direction = delta / norm_of(delta, norm).reshape(n, 1)
    assert direction.mean(dim=0).abs().max() < 0.09
    assert (direction.T.corrcoef() - torch.eye(d)).abs().max() < 0.13
    assert (direction.abs().mean(dim=0) - direction.abs().mean()).abs().max() < 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_generators_and_seeds(kernels: ModuleType, norm: str) -> None:
    x = torch.randn(SHAPE)

    def draw(generator: torch.Generator | None = None) -> Tensor:
        return random_start(x, norm=norm, eps=0.1, generator=generator)

    first, second = (draw(g) for g in [torch.Generator().manual_seed(3)] * 2)
    assert not torch.equal(first, second)  # the generator has advanced
    assert same_bits(draw(torch.Generator().manual_seed(3)), first)
    torch.manual_seed(3)
    assert same_bits(draw(), draw(torch.Generator(DEVICE).manual_seed(3)))
    assert not torch.equal(draw(torch.Generator().manual_seed(4)), first)
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        assert torch.isfinite(start(x, norm, seed=seed)).all()
    assert not torch.equal(start(x, norm, seed=1), start(x, norm, seed=1 + 2**32))  # all 64 bits count


def test_without_kernels_the_values_are_those_of_torch(kernels: ModuleType) -> None:
    x = torch.zeros(2, 5)
    with plain_pytorch():
        drawn = random_start(x, norm="inf", eps=1.0, generator=torch.Generator().manual_seed(1))
    assert same_bits(drawn, torch.empty(2, 5).uniform_(-1, 1, generator=torch.Generator().manual_seed(1)))


def test_a_seed_that_does_not_fit(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="seed must be one int64"):
        start_ops.random_start(torch.zeros(2, 3), "2", 0.1, None, None, None, torch.tensor([1, 2]))


def test_eps_zero_changes_no_bit(kernels: ModuleType) -> None:
    x = torch.randn(SHAPE)
    for norm in NORMS:
        assert same_bits(start(x, norm, eps=0.0), x)
