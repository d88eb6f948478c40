"""Clipping of a matrix's singular values by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_map import compute_dtype

_FACTOR = 16.0  # how far above beta a pass clips to beta itself: squares of more lose float32's digits
_MOST_PASSES = 40  # beyond the range of float32
_NEAR = 1e-3  # share of beta^2 within which of a squared singular value the sign is not asked for
_SIGN_ITERATIONS = 18
_ROOT_ITERATIONS = 9
_LARGEST_FACTOR = 1.6977  # keeps the largest eigenvalue, which the factor moves most, above 0.1 (Chen and Chow 2014)


def clip_singular_values(weight: Tensor, beta: float, passes: int | None = None) -> Tensor:
    """U min(S, beta) V^T of a matrix W = U S V^T.

    With G = W^T W / beta^2, M = max(G, I) = (G + I + |G - I|) / 2 and |A| = A sign(A), it is W M^(-1/2). Sign and root
    come from Newton-Schulz iterations with the factors of Chen and Chow (2014); there is no decomposition, and nothing
    is divided by a small singular value, so the rank does not matter. Of the smaller side's size are about sixty
    products of square matrices in each pass.

    Args:
        weight: (m, n), of any dtype; computed in float32 at least. Returned as it is where an element is not finite.
        passes: each clips to beta what is up to 16 beta, larger values to a 16th of the largest. None: as many as that
            takes, for which the host waits for the device.
    """
    if weight.shape[0] < weight.shape[1]:
        return clip_singular_values(weight.T, beta, passes).T
    with torch.autocast(weight.device.type, enabled=False):
        return _clipped_in_passes(weight, beta, passes)


def _clipped_in_passes(weight: Tensor, beta: float, passes: int | None) -> Tensor:
    w = weight.to(compute_dtype(weight))
    finite = w.isfinite().all()
    w = torch.where(finite, w, 0.0)
    moves = torch.zeros((), dtype=torch.bool, device=w.device)
    for _ in range(_MOST_PASSES if passes is None else passes):
        bound = _norm_bound(w)
        moves = moves | (bound > beta)
        w = _clipped(w, (bound / _FACTOR).clamp(min=beta))
        if passes is None and bool(bound <= _FACTOR * beta):
            break
    # What is proven to be within beta is not moved, not even by rounding.
    return torch.where(finite & moves, w.to(weight.dtype), weight)


def _clipped(w: Tensor, beta: Tensor) -> Tensor:
    eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    gram = _gram(w / beta)
    largest = _schatten(gram) * 1.01
    apart = gram - eye
    size = torch.maximum(largest - 1.0, torch.ones_like(largest))  # of its eigenvalues, -1 to largest - 1
    above = _symmetric(apart @ _sign(apart / size, _NEAR / size))
    clamped = (gram + eye + above) / 2  # eigenvalues from 1 to largest
    largest = torch.maximum(largest, torch.ones_like(largest)) * 1.01
    return w @ (_inverse_root(clamped / largest, largest.rsqrt() * 0.99) * largest.rsqrt())


def _sign(x: Tensor, smallest: Tensor) -> Tensor:
    """sign(x) of a symmetric x with eigenvalues in [-1, 1]: exact from ``smallest`` on, between the signs below it."""
    eye = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    for _ in range(_SIGN_ITERATIONS):
        factor, smallest = _scaling(smallest)
        x = factor * x
        x = _symmetric(x @ (3.0 * eye - x @ x)) / 2
    return x


def _inverse_root(m: Tensor, smallest: Tensor) -> Tensor:
    """m^(-1/2) of a symmetric m with eigenvalues in [smallest^2, 1] (Higham 2008, section 6.3)."""
    eye = torch.eye(m.shape[0], dtype=m.dtype, device=m.device)
    root, inverse = m, eye
    for _ in range(_ROOT_ITERATIONS):
        factor, smallest = _scaling(smallest)
        step = factor * (3.0 * eye - factor * factor * (inverse @ root)) / 2
        root, inverse = root @ step, step @ inverse
    return inverse


def _scaling(smallest: Tensor) -> tuple[Tensor, Tensor]:
    """The factor a of x <- a x (3 - a^2 x^2) / 2 for x in [smallest, 1], and where that leaves the smallest."""
    factor = (3.0 / (1.0 + smallest + smallest * smallest)).sqrt().clamp(max=_LARGEST_FACTOR)
    # The largest can end below the image of the smallest.
    ends = [factor * x * (3.0 - (factor * x) ** 2) / 2 for x in (smallest, torch.ones_like(smallest))]
    return factor, torch.minimum(*ends)


def _norm_bound(w: Tensor) -> Tensor:
    """An upper bound of the largest singular value: at most n^(1/8) times as large."""
    largest = w.abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)
    return 1.001 * scale * _schatten(_gram(w / scale)).sqrt()


def _schatten(gram: Tensor) -> Tensor:
    """The Schatten norm of order 4, an upper bound of the largest eigenvalue."""
    return torch.linalg.matrix_norm(gram @ gram).sqrt()


def _gram(w: Tensor) -> Tensor:
    return w.T @ w


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.T) / 2
