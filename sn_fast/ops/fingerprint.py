"""The content of a weight: a kept copy compared bit by bit, or a 64-bit hash that a device compares by itself."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .library import define, stream_of
from .records import REPLACED, SAMPLE, SPREAD, is_dense, length_of, record_plan

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HOST_CHUNK = 1 << 15  # words that stay in a core's cache while they are mixed
_DEVICE_CHUNK = 1 << 24  # bounds the memory of the temporaries
_STRETCH = 1 << 16  # elements, of two weights, that stay in a core's cache
_TINY = 1e-30  # squares below it may have lost numbers too small for float32

# splitmix64 (Steele, Lea, Flood 2014), its constants as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _fingerprint(weight: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits in logical order, then its sampled words: int64 (1 + k,).

    The sum over i of mix(word_i + (i + 1) * golden), modulo 2^64: every word is mixed with its logical index by a
    nonlinear function, so that permutations, sign flips in pairs and changes by one ulp all change the sum. A sum of
    integers has the same bits in every order. A memory format does not change it.
    """
    with torch.no_grad():
        words = weight.detach().resolve_neg().reshape(-1).view(_WORDS[weight.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        chunk = min(_HOST_CHUNK if words.device.type == "cpu" else _DEVICE_CHUNK, max(1, words.numel()))
        steps = torch.arange(1, chunk + 1, device=words.device) * _GOLDEN
        for i in range(0, words.numel(), chunk):
            part = words[i : i + chunk].to(torch.int64)
            total += _mix(part + steps[: part.numel()] + _signed(i * _GOLDEN)).sum()
        return torch.cat([total[None], _sample(words).to(torch.int64)])


def _mix(z: Tensor) -> Tensor:
    # Shifts of signed integers copy the sign; the masks make them logical.
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _sample(flat: Tensor) -> Tensor:
    """At most SAMPLE elements, one of every stretch, at a place that differs: not all of one column or kernel tap."""
    step = max(1, -(-flat.numel() // SAMPLE))
    if step == 1:
        return flat
    starts = torch.arange(0, flat.numel(), step, device=flat.device)
    return flat[(starts + starts // step * SPREAD % step).clamp_(max=flat.numel() - 1)]


def _fingerprint_kernel(module: ModuleType, weight: Tensor) -> Tensor:
    weight = weight.detach().resolve_neg()
    if not is_dense(weight):
        weight = weight.contiguous()
    plan = record_plan(module, [weight])
    if plan is None:
        return _fingerprint(weight)
    record = torch.zeros(length_of(weight.numel()), dtype=torch.int64, device=weight.device)
    scratch = torch.empty(plan.zeroed_bytes, dtype=torch.uint8, device=weight.device)
    zeroed = [scratch.data_ptr() + offset for offset in plan.zeroed]
    content = (plan.tables.addresses(), plan.n_units, [weight.data_ptr()], [record.data_ptr()])
    module.record((*content, zeroed, plan.zeroed_bytes, 0, True, 0.0), stream_of(weight.device))
    return record


fingerprint = define(
    "fingerprint(Tensor weight) -> Tensor",
    _fingerprint,
    lambda weight: weight.new_empty(length_of(weight.numel()), dtype=torch.int64),
    _fingerprint_kernel,
)


def record_of(weight: Tensor, *, hashed: bool) -> Tensor:
    """What a later weight is compared with: a copy, or a fingerprint."""
    return fingerprint(weight) if hashed else weight.detach().resolve_neg().clone()


def is_hashed(record: Tensor) -> bool:
    """Whether a record is a fingerprint; weights are floating-point."""
    return record.dtype == torch.int64


def update_record(record: Tensor, weight: Tensor) -> Tensor:
    """The record of this weight, in place of the other where that fits."""
    if is_hashed(record):
        fresh = fingerprint(weight)
        return record.copy_(fresh) if record.shape == fresh.shape else fresh
    if record.shape == weight.shape and record.dtype == weight.dtype and record.device == weight.device:
        return record.copy_(weight.detach())
    return record_of(weight, hashed=False)


def same_content(weight: Tensor, record: Tensor) -> bool:
    """Whether a weight on the host has the bits of its record; NaN equals itself, and zero is not minus zero."""
    if is_hashed(record):
        return torch.equal(fingerprint(weight), record)
    if weight.shape != record.shape or weight.dtype != record.dtype:
        return False
    a, b = weight.detach().resolve_neg(), record
    dtype = _WORDS[a.element_size()]
    if a.stride() != b.stride() or not is_dense(a) or _memcmp is None:
        return torch.equal(a.view(dtype), b.view(dtype))
    return a.numel() == 0 or _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0


def _find_memcmp() -> Callable[[int, int, int], int] | None:
    """The C library's comparison of memory; torch.equal takes half as long again, and serves where this is missing."""
    try:
        function = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function


_memcmp = _find_memcmp()


def renew_record(record: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    """The record of this weight, and whether the weight is so far from the one before that vectors of that say little.

    A step of training moves a weight by one to three per cent of its norm, an initialisation by 140 %. Only the start
    of the iteration depends on it. A change of scale alone leaves the vectors right. All elements count where there is
    a copy, for a write to one row, column or place can be most of the norm; a hashed record has a sample alone.
    """
    now = weight.detach().resolve_neg()  # NumPy and views of the bits take no lazy minus
    if is_hashed(record):
        before = record[1:].to(_WORDS[weight.element_size()]).view(weight.dtype)
        replaced = _is_replaced(_sample(now.reshape(-1)), before)
        return update_record(record, weight), replaced
    if now.shape != record.shape or now.dtype != record.dtype or now.device != record.device:
        return update_record(record, weight), True
    if now.stride() != record.stride() or not is_dense(now):
        replaced = _is_replaced(now.reshape(-1), record.reshape(-1))
        return update_record(record, weight), replaced
    # In the order of the memory, a stretch at a time: what is copied is in the cache by then.
    now, before = (t.as_strided((t.numel(),), (1,)) for t in (now, record))
    squares = (0.0, 0.0, 0.0)
    exact = now.dtype == torch.float64 or now.numel() <= SAMPLE
    for a, b in zip(now.split(_STRETCH), before.split(_STRETCH)):
        part = _products(a, b, exact)
        if not exact and not all(map(_is_normal, part)):  # out of the range of float32's squares
            part = _products(a, b, True)
        squares = squares[0] + part[0], squares[1] + part[1], squares[2] + part[2]
        b.copy_(a)
    return record, _is_far(*squares)


def is_replaced(weight: Tensor, record: Tensor) -> bool:
    """``renew_record`` without the new record."""
    return renew_record(record.clone(), weight)[1]


def _is_replaced(now: Tensor, before: Tensor) -> bool:
    return now.shape != before.shape or _is_far(*_products(now, before, True))


def _is_far(new: float, both: float, old: float) -> bool:
    """From the squares of two weights and their product: whether much of the new one is no multiple of the old one."""
    if not math.isfinite(new):
        return False  # vectors of such a weight would be no better
    away = new - (both * both / old if old > 0 else 0.0 if old == 0 else math.nan)
    return not away <= REPLACED**2 * new


def _products(now: Tensor, before: Tensor, exact: bool) -> tuple[float, float, float]:
    """now . now, now . before, before . before; in float64 if ``exact``."""
    if not exact and now.dtype == torch.float32:
        return float(now.dot(now)), float(now.dot(before)), float(before.dot(before))
    # For small vectors, a fifth of PyTorch's time. Of copies: the storage of memory that NumPy has seen cannot be
    # resized, and that is how FSDP frees what it has gathered.
    a, b = (t.to("cpu", torch.float64, copy=True).numpy() for t in (now, before))
    with np.errstate(all="ignore"):  # the weights may be NaN
        return float(a.dot(a)), float(a.dot(b)), float(b.dot(b))


def _is_normal(square: float) -> bool:
    return _TINY < abs(square) < math.inf
