"""Random convolution geometries, of every kind that ConvOperator takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from sn_fast import ConvOperator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Case:
    """A convolution drawn by hypothesis; ``seed`` gives its weight."""

    kernel: tuple[int, ...]
    input_size: tuple[int, ...]
    cin: int
    cout: int
    groups: int
    transposed: bool
    seed: int
    options: dict[str, Any]

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        rows, columns = (self.cin, self.cout) if self.transposed else (self.cout, self.cin)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (rows, columns // self.groups, *self.kernel)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def operator(self, dtype: torch.dtype = torch.float64) -> ConvOperator:
        return ConvOperator(
            self.weight(dtype), self.input_size, groups=self.groups, transposed=self.transposed, **self.options
        )

    def by_torch(self, x: Tensor) -> Tensor:
        """The layer as PyTorch's own functions compute it: an independent answer."""
        o, n, weight = self.options, len(self.kernel), self.weight(x.dtype)
        if self.transposed:
            return _CONV_TRANSPOSE[n](
                x, weight, None, o["stride"], o["padding"], o["output_padding"], self.groups, o["dilation"]
            )
        padding = o["padding"]
        if isinstance(padding, str):
            totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(o["dilation"], self.kernel)]
            padding = [(t // 2, t - t // 2) for t in totals]
        pairs = [(p, p) if isinstance(p, int) else p for p in padding]
        mode = "constant" if o["padding_mode"] == "zeros" else o["padding_mode"]
        x = F.pad(x, [p for pair in reversed(pairs) for p in pair], mode=mode)
        return _CONV[n](x, weight, None, o["stride"], 0, o["dilation"], self.groups)


@st.composite
def cases(draw: st.DrawFn, max_size: int = 8) -> Case:
    """1d, 2d and 3d; strides, dilations, groups, non-square, all paddings and modes, transposed with output_padding."""
    n = draw(st.sampled_from([1, 2, 2, 3]))
    limit = max_size if n < 3 else 5

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    cin, cout = (groups * draw(st.integers(1, 2 if n == 3 else 3)) for _ in range(2))
    stride, dilation, kernel = axes(1, 4), axes(1, 3), axes(1, 4)
    seed = draw(st.integers(0, 2**31))
    transposed = draw(st.sampled_from([False, False, True]))
    options: dict[str, Any] = {"dilation": dilation}
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    if transposed:
        size = axes(1, 4)
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        out = [(h - 1) * s + e + x for h, s, e, x in zip(size, stride, extents, extra)]
        padding: Any = tuple(draw(st.integers(0, min(3, (o - 1) // 2))) for o in out)
        options |= {"stride": stride, "padding": padding, "output_padding": extra}
        return Case(kernel, size, cin, cout, groups, True, seed, options)
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    kind = draw(st.sampled_from(["symmetric", "pairs", "same", "valid"]))
    if kind == "same":
        stride = (1,) * n
        reach = [e - e // 2 for e in extents]
        size = tuple(draw(st.integers(r + 1, max(limit, r + 1))) for r in reach)
        padding = "same"
    elif kind == "valid":
        size = tuple(draw(st.integers(e, max(limit, e))) for e in extents)
        padding = "valid"
    else:
        size = axes(1, limit)
        room = {"reflect": [h - 1 for h in size], "circular": list(size)}.get(mode, [3] * n)
        least = [max(0, e - h) for e, h in zip(extents, size)]
        # Large enough that the kernel fits; the size grows where the mode does not allow that much padding.
        size = tuple(h if -(-need // 2) <= min(r, 3) else h + need for h, need, r in zip(size, least, room))
        room = {"reflect": [h - 1 for h in size], "circular": list(size)}.get(mode, [3] * n)
        least = [-(-max(0, e - h) // 2) for e, h in zip(extents, size)]
        before = tuple(draw(st.integers(lo, max(lo, min(r, 3)))) for lo, r in zip(least, room))
        after = tuple(draw(st.integers(lo, max(lo, min(r, 3)))) for lo, r in zip(least, room))
        padding = before if kind == "symmetric" else tuple(zip(before, after))
    options |= {"stride": stride, "padding": padding, "padding_mode": mode}
    return Case(kernel, size, cin, cout, groups, False, seed, options)
