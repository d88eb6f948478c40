"""Integer tables on a device, for kernels that may run long after the call, and for CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .library import is_capturing, stream_of

_CAPTURED: dict[int, Tables] = {}  # a graph reads its tables as long as it lives, which nobody is told


class Tables:
    """Arrays of integers, or of records of such, copied to a device once.

    They stay valid for every kernel that was given their addresses, on whatever stream, and for every CUDA graph.
    """

    def __init__(self, arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> None:
        if is_capturing(device):
            raise RuntimeError(
                "sn_fast: these layers are met for the first time while a CUDA graph is captured, and their tables "
                "cannot be copied to the device then. Remedy: run the same call once before the capture"
            )
        flat = [np.ascontiguousarray(array).view(np.int32).reshape(-1) for array in arrays]
        # In a thread of its own: torch.compile may have this thread's memory come from a pool that graphs write over.
        with ThreadPoolExecutor(1) as thread:
            self._tensors = thread.submit(lambda: [torch.from_numpy(a).to(device) for a in flat]).result()
        self.device = device

    def addresses(self) -> list[int]:
        """For one use, on the current stream."""
        if is_capturing(self.device):
            _CAPTURED[id(self)] = self
        elif stream_of(self.device)[0] != 0:  # they were allocated on the default stream
            stream = torch.cuda.current_stream(self.device)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return [tensor.data_ptr() for tensor in self._tensors]

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """A copy of one array, as 4-byte integers."""
        return self._tensors[index].cpu().numpy()
