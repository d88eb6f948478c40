"""What the checks must know of tensors' values, read from the device in one go: an attack waits for it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Reading:
    """Values to be read, each with what judges them. Nothing is read where that is impossible: see ``possible``."""

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        self.possible = (
            not torch.compiler.is_compiling()
            and x.device.type != "meta"
            and not isinstance(x, torch._subclasses.FakeTensor)
            and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        )
        self._values: list[Tensor] = []
        self._judges: list[tuple[Callable[..., Any], int]] = []

    def expect(self, judge: Callable[..., Any], *values: Tensor) -> None:
        """Have ``judge(*numbers)`` raise what is wrong with ``values``, tensors of one element, when all are read."""
        if self.possible:
            self._values += values
            self._judges.append((judge, len(values)))

    def finish(self) -> None:
        """Read the values and judge them, in the order in which they came."""
        if not self._values:
            return
        exact = torch.float32 if self._device.type == "mps" else torch.float64
        numbers = torch.stack([v.detach().to(self._device, exact).reshape(()) for v in self._values]).tolist()
        for judge, count in self._judges:
            judge(*numbers[:count])
            numbers = numbers[count:]
        self._values, self._judges = [], []
