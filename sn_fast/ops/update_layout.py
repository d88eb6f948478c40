"""How the tensors of one update lie in memory, as the compiled module is told it (csrc/attacks/samples.h)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..reference.samples import Bound
from .layout import memory_digits
from .library import dtype_code

MAX_INDEX = 2**31
"""Of an element in its sample, where the kernels divide by sizes."""


class Layout:
    """How the tensors of one update lie in memory: as ``out``, whose samples are dense and one after the other.

    Its methods describe a tensor to the compiled module (csrc/attacks/samples.h), and keep alive what they copied.
    """

    def __init__(self, x_adv: Tensor) -> None:
        self.batch, self.numel = len(x_adv), math.prod(x_adv.shape[1:])
        self.result = self.out = torch.empty_like(x_adv)
        if not (self.out.is_contiguous() or self._is_dense()):
            self.out = torch.empty_like(x_adv, memory_format=torch.contiguous_format)
        self._strides = self.out.stride()
        self._copies: list[Tensor] = []

    @property
    def dims(self) -> list[int]:
        """Dimensions of a sample from the fastest to the slowest; those of size 1 have no place in memory."""
        shape, strides = self.out.shape, self.out.stride()
        return sorted((d for d in range(len(shape) - 1, 0, -1) if shape[d] != 1), key=lambda d: strides[d])

    def _is_dense(self) -> bool:
        expected, strides = 1, self.out.stride()
        for d in self.dims:
            if strides[d] != expected:
                return False
            expected *= self.out.shape[d]
        return self.batch <= 1 or strides[0] == self.numel

    @property
    def sizes(self) -> tuple[int, int]:
        return self.batch, self.numel

    def elements(self, t: Tensor | None) -> tuple[int, int, int]:
        """A tensor of the batch's shape: address, dtype code, batch stride."""
        if t is None:
            return 0, 0, 0
        strides = t.stride()
        if strides != self._strides and not self._matches(t):
            t = self._kept(torch.empty_like(self.out, dtype=t.dtype).copy_(t))
            strides = self._strides
        code = dtype_code(t)
        assert code is not None
        return t.data_ptr(), code, self.numel if self.batch == 1 else strides[0]

    def amount(self, value: float, per_sample: Tensor | None = None) -> tuple[float, int]:
        """eps or alpha."""
        return value, 0 if per_sample is None else self._kept(per_sample.to(torch.float32).contiguous()).data_ptr()

    def flags(self, active: Tensor | None) -> int:
        return 0 if active is None else self._kept(active.contiguous()).data_ptr()

    def bound(self, t: Bound) -> tuple[int, int, tuple[int, int, int, int], float]:
        """``lower`` or ``upper``: kind, address, (batch stride, inner, count, stride), number."""
        if t is None:
            return 0, 0, (0, 1, 1, 0), 0.0
        if isinstance(t, float):
            return 4, 0, (0, 1, 1, 0), t
        t = self._kept(t.to(torch.float32))
        if t.numel() == 1:
            return 1, t.data_ptr(), (0, 1, 1, 0), 0.0
        t, dims = t.expand(self.out.shape), self.dims
        run = [d for d in dims if t.stride(d) != 0]
        batch_stride = self.numel if self.batch == 1 else t.stride(0)
        if not run:
            return 1, t.data_ptr(), (batch_stride, 1, 1, 0), 0.0
        if not self._matches(t):
            first, last = dims.index(run[0]), dims.index(run[-1])
            is_run = last - first == len(run) - 1
            is_even = all(t.stride(b) == t.stride(a) * t.shape[a] for a, b in pairwise(run))
            if is_run and is_even and self.numel < MAX_INDEX:
                inner, count = (math.prod(t.shape[d] for d in part) for part in (dims[:first], run))
                return 2, t.data_ptr(), (batch_stride, inner, count, t.stride(run[0])), 0.0
            t = self._kept(torch.empty_like(self.out, dtype=torch.float32).copy_(t))
            batch_stride = self.numel
        return 3, t.data_ptr(), (batch_stride, 1, 1, 0), 0.0

    def digits(self) -> list[tuple[int, int]]:
        """From an element's place in memory to its logical index: sizes and strides, fastest first; [] if equal."""
        return memory_digits(self.out.shape, self.dims)

    def finish(self) -> Tensor:
        return self.result if self.out is self.result else self.result.copy_(self.out)

    def _matches(self, t: Tensor) -> bool:
        """Whether samples of t lie as those of ``out``."""
        strides = t.stride()
        return all(strides[d] == self._strides[d] for d in self.dims)

    def _kept(self, t: Tensor) -> Tensor:
        self._copies.append(t)
        return t
