"""Products of any operator with a batch, whatever its own ``matvec`` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .protocol import AbstractOperator, OwnProducts

_CHUNK = 1 << 26  # elements of the batches that are multiplied at once


def apply(op: AbstractOperator, x: Tensor) -> Tensor:
    """A x for a batch (N, *in_shape); in the precision of ``x`` where the operator can, and with its dtype."""
    return _apply(op, x, op.matvec, "matvec", tuple(op.in_shape), tuple(op.out_shape))


def apply_adjoint(op: AbstractOperator, y: Tensor) -> Tensor:
    """A^T y for a batch (N, *out_shape)."""
    return _apply(op, y, op.rmatvec, "rmatvec", tuple(op.out_shape), tuple(op.in_shape))


def _apply(
    op: AbstractOperator,
    x: Tensor,
    product: Callable[[Tensor], Tensor],
    name: str,
    domain: tuple[int, ...],
    codomain: tuple[int, ...],
) -> Tensor:
    if takes_batches_of_any_dtype(op):
        return product(x).to(x.dtype)
    batch = x.reshape(-1, *domain).to(op.dtype)
    what = f"{type(op).__name__}.{name}"
    if _takes_batches(op, product, name, domain, codomain):
        result = _checked(product(batch), what, (len(batch), *codomain))
    else:
        result = torch.stack([_checked(product(one), what, codomain) for one in batch])
    return result.to(x.dtype)


def takes_batches_of_any_dtype(op: AbstractOperator) -> bool:
    """Whether this is an operator of this package, with the products that it came with."""
    return isinstance(op, OwnProducts) and op.has_own_products()


def _checked(result: Any, what: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        given = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{what} returned {given}, expected shape {shape}")
    if not result.is_floating_point():
        raise TypeError(f"{what} returned dtype {result.dtype}; real floating-point operators are supported")
    return result


def _takes_batches(
    op: AbstractOperator,
    product: Callable[[Tensor], Tensor],
    name: str,
    domain: tuple[int, ...],
    codomain: tuple[int, ...],
) -> bool:
    """Whether a user's product maps a batch sample by sample; ``W @ x`` for example takes one vector only."""
    known = op.__dict__.setdefault("_takes_batches", {}) if hasattr(op, "__dict__") else {}
    if name not in known:
        known[name] = maps_batches(product, domain, op.dtype, op.device, codomain)
    answer: bool = known[name]
    return answer


def maps_batches(
    function: Callable[[Tensor], Any],
    domain: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    codomain: tuple[int, ...] | None = None,
) -> bool:
    """Whether ``function`` maps (N, *domain) to (N, *codomain), each sample as it would alone."""
    # A size that no product of matrices takes for that of a vector.
    taken = {*domain, *(codomain or ())}
    n = next(k for k in range(2, 100) if k not in taken)
    x = probe(n, domain, dtype, device, seed=1)
    try:
        whole = function(x)
        alone = function(x[1:2])
    except Exception:  # a user's function can fail in any way; one vector at a time is tried next
        return False
    if not isinstance(whole, Tensor) or not isinstance(alone, Tensor):
        return False
    fits = whole.ndim >= 1 and whole.shape[0] == n and alone.shape == whole[1:2].shape
    if not fits or (codomain is not None and tuple(whole.shape[1:]) != codomain):
        return False
    size = float(whole.abs().max()) if whole.numel() else 0.0
    if size == 0 or not math.isfinite(size):
        return True
    return bool((whole[1:2] - alone).abs().max() <= visible(dtype, device) * size)


def probe(n: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """The same random vectors (n, *shape) every time."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return x.to(device, dtype)


def visible(dtype: torch.dtype, device: torch.device) -> float:
    """A relative difference that is no rounding, on a GPU TF32's included."""
    return max(5e-3 if device.type == "cuda" else 1e-4, 50 * torch.finfo(dtype).eps)


def dense(op: AbstractOperator, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix (m, n), by products with the unit vectors of the smaller side."""
    dtype = dtype or torch.promote_types(op.dtype, torch.float32)
    m, n = math.prod(op.out_shape), math.prod(op.in_shape)
    by_rows = m < n
    shape = op.out_shape if by_rows else op.in_shape
    rows = []
    for part in torch.arange(min(m, n), device=op.device).split(max(1, _CHUNK // max(m, n))):
        units = torch.zeros(len(part), min(m, n), dtype=dtype, device=op.device)
        units[torch.arange(len(part)), part] = 1
        image = apply_adjoint(op, units.reshape(-1, *shape)) if by_rows else apply(op, units.reshape(-1, *shape))
        rows.append(image.reshape(len(part), -1))
    return torch.cat(rows) if by_rows else torch.cat(rows).T
