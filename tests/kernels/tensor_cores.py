"""How tensor cores round, and what error of a sum follows: the bar for tf32 and bf16.

A matrix instruction adds its products to the sum in blocks. The products of a block and the sum are aligned to the
largest of them, each is cut off ``extra_bits`` below float32's last bit, and what they add up to is cut to float32
(Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"). All cuts are towards zero, so those
of the sum do not cancel as roundings to nearest do: the error grows with the depth, not with its root.

Let s_j be the sum after j of n blocks, and p the products. In units of 2^-23 |s_j|, which is at least float32's last
bit there,

    the sum's cut         takes between 0 and 1: 1/2 on average, always towards zero, give or take 1 / sqrt(12);
    a product's cut       takes between 0 and 2^-extra_bits, towards zero, so with the sign of the product, which is
                          anything: its root mean square is 2^-extra_bits / sqrt(3), and there are as many as products.

Terms of any sign make s_j grow as a random walk does, as sqrt(j / n) of S = max(|s|, sqrt(sum p^2)). The sum of
sqrt(j / n) over j is 2 n / 3 + 1 / 2 at most, that of j / n is (n + 1) / 2. Hence, in units of 2^-23 S,

    mean    (2 n / 3 + 1 / 2) / 2
    spread  sqrt((block 4^-extra_bits / 3 + 1 / 12) (n + 1) / 2)

Parts of a split sum each have a chain of their own: n is that of the longest part, since parts are cut in proportion to
themselves. The parts are added in float32, to nearest: p of them give sqrt(p / 24) more.

The bar is twice mean + spread, as it is twice PyTorch's error elsewhere. ``size`` is S / |s|, where |.| is the norm
over all elements compared. 3xtf32 starts a chain anew for every 8 products, and is held to float32's bar.

With the H100's numbers and plans for as many blocks, the emulation gives the errors measured on an H200 within 0.3 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sn_fast.ops import plan as plans
from sn_fast.ops import schedule
from sn_fast.ops.plan import Plan

WORK_ITEM = 2.0**-23  # float32's last bit, relative


@dataclass(frozen=True)
class TensorCore:
    """Products of a block, by type of the operands; and bits below float32's last that are kept."""

    tf32: int
    bf16: int
    extra_bits: int

    def block(self, precision: str) -> int:
        """Products that are added at a time."""
        return {"tf32": self.tf32, "bf16": self.bf16}[precision]

    def error(self, precision: str, depths: list[int], size: float, parts: int = 1) -> float:
        """The bar, relative to the sum, of chains of ``depths`` products, each begun on a new block."""
        block = self.block(precision)
        n = sum(-(-depth // block) for depth in depths)
        mean = (2 * n / 3 + 1 / 2) / 2
        variance = (block * 4.0**-self.extra_bits / 3 + 1 / 12) * (n + 1) / 2
        joining = parts / 24 if parts > 1 else 0.0
        return 2 * (mean + math.sqrt(variance + joining)) * WORK_ITEM * max(1.0, size)


TENSOR_CORES = {"H100": TensorCore(8, 16, 2), "A100": TensorCore(4, 8, 1)}


def tensor_core_of(module: ModuleType) -> TensorCore:
    """That of the emulation or of the GPU; the A100's, which cuts more, for those of which nothing is known."""
    if hasattr(module, "tensor_core"):
        return TensorCore(*module.tensor_core())
    return TENSOR_CORES["H100" if torch.cuda.get_device_capability()[0] == 9 else "A100"]


def use(module: ModuleType, core: TensorCore) -> None:
    """Have the emulation add as these tensor cores do."""
    module.set_tensor_core(core.tf32, core.bf16, core.extra_bits)


def longest_chain(plan: Plan, half: int) -> tuple[list[int], int]:
    """Of one half step's GEMM tiles: the chain's products, one number per pass over some slots, and the most parts."""
    items = np.split(plan.tables[1].view(schedule.WORK_ITEM), [plan.n_items[0]])[half]
    items = items[items["kind"] >= schedule.GEMM64]
    maps = np.split(plan.tables[0].view(plans.OPERATOR_MAP), 2)[half]
    table = plan.tables[3]
    slots = table[maps["tile_slots"][items["map"]] + 2 * items["tile"] + 1]
    channels = items["channel_end"] - items["channel"]
    longest = int(np.argmax(slots * channels))
    passes = [min(64, int(slots[longest]) - i) for i in range(0, int(slots[longest]), 64)]
    return [int(channels[longest]) * n for n in passes], int(items["splits"].max())


def relative_size(squares: Tensor, total: Tensor, groups: int) -> float:
    """S / |s| of ``error``: of the group where it is largest; ``squares`` are the sums of the products' squares."""
    spread, norm = squares.reshape(groups, -1).sum(1).sqrt(), total.reshape(groups, -1).norm(dim=1)
    return float((spread / norm.clamp(min=1e-300)).max())
