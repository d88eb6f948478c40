"""A point drawn uniformly from a ball, as a function of a seed: equal on every device and for every layout.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) draws, the key being the seed: counter q gives four words, of which
elements 4q to 4q + 3 of the batch are made, in logical order. Which thread draws them has no part in it. Integers are
int64 here, of which a product's low 64 bits are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .linear_map import compute_dtype
from .pgd_step import project
from .samples import Bound

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_ELEMENTS, _RADIUS = 0, 1  # third word of the counter


def random_start(
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
    seed: Tensor,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """x + a random point of the ball of radius eps, then clipped. ``seed``: int64, of one element."""
    dtype = compute_dtype(x)
    shape = (x.shape[0], *[1] * (x.dim() - 1))
    words = _draw(torch.arange((x.numel() + 3) // 4, device=x.device), _ELEMENTS, seed)
    delta = torch.stack(_elements(words, norm, dtype), dim=1).flatten()[: x.numel()].reshape(x.shape)
    scale = eps if eps_per_sample is None else eps_per_sample.to(dtype).reshape(shape)
    if norm != "inf":
        drawn = torch.linalg.vector_norm(delta.flatten(1).double(), 2 if norm == "2" else 1, dim=1)
        # The volume inside radius r is r^D: a radius drawn as r itself would pile up at the centre.
        radius = _unit(_draw(torch.arange(x.shape[0], device=x.device), _RADIUS, seed)[0], dtype)
        radius = (radius.log() / max(math.prod(x.shape[1:]), 1)).exp()
        scale = scale * (radius / torch.where(drawn == 0, 1.0, drawn)).to(dtype).reshape(shape)
    start = torch.empty_like(x, dtype=dtype)
    torch.add(x.to(dtype), delta * scale, out=start)
    # Every ball lies in the box: rounding must not leave it.
    return project(start, x.to(dtype), "inf", eps, eps_per_sample, lower, upper, low, high).to(x.dtype)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of words in [0, 2^32), elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = _high(second) ^ c1 ^ k0, second & _MASK, _high(first) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _MASK


def _draw(index: Tensor, stream: int, seed: Tensor) -> tuple[Tensor, ...]:
    counter = (index & _MASK, _high(index), torch.full_like(index, stream), torch.zeros_like(index))
    seed = seed.reshape(())
    return philox(counter, (seed & _MASK, _high(seed)))


def _unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """In (0, 1]."""
    return bits.to(dtype) * 2.0**-32 + 2.0**-33


def _signed_unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """In [-1, 1]."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(dtype) * 2.0**-31


def _elements(words: tuple[Tensor, ...], norm: str, dtype: torch.dtype) -> list[Tensor]:
    """Four elements of four words."""
    # A density that depends on the norm alone gives a uniform direction: Gauss for l2, Laplace for l1.
    if norm == "inf":
        return [_signed_unit(word, dtype) for word in words]
    if norm == "2":  # Box, Muller 1958
        radii = [(-2 * _unit(word, dtype).log()).sqrt() for word in words[::2]]
        angles = [math.pi * _signed_unit(word, dtype) for word in words[1::2]]
        return [radius * turn(angle) for radius, angle in zip(radii, angles) for turn in (torch.cos, torch.sin)]
    exponentials = [-_unit((word << 1) & _MASK, dtype).log() for word in words]  # a sign and 31 bits
    return [torch.where(word >= 2**31, -e, e) for word, e in zip(words, exponentials)]
