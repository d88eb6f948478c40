"""What this GPU can do at most, as measured now: copies, float32, tf32 and bf16 matrix products."""

from __future__ import annotations

import torch

from ..context import Context
from ..timing import Timer, digits


def run(context: Context) -> None:
    """Record every peak."""
    for name, value in measure(context).items():
        context.record(name, value)
        print(f"{name}: {value:.1f}", flush=True)


def measure(context: Context) -> dict[str, float]:
    """``copy_gb_per_s`` (bytes read and written) and ``<precision>_tflop_per_s``."""
    timer = Timer(context.device, context.repeats)
    peaks = {}
    peaks["copy_gb_per_s"] = _copy(timer, context.pick(1 << 30, 1 << 18), context.device)
    before = torch.get_float32_matmul_precision()
    try:
        for name, dtype, precision in (
            ("fp32", torch.float32, "highest"),
            ("tf32", torch.float32, "high"),
            ("bf16", torch.bfloat16, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            n = context.pick(8192, 64)
            a, b = torch.randn(2, n, n, device=context.device, dtype=dtype)
            out = torch.empty_like(a)
            product = {"product": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}
            took = timer.on_device(product, flush=False)["product"]["median"]
            peaks[f"{name}_tflop_per_s"] = 2 * n**3 / took / 1e6
    finally:
        torch.set_float32_matmul_precision(before)
    return {name: digits(value) for name, value in peaks.items()}


def _copy(timer: Timer, size: int, device: str) -> float:
    """GB/s, bytes read and written together."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    took = timer.on_device({"copy": lambda: target.copy_(source)}, flush=False)["copy"]["median"]
    return 2 * size / took / 1e3


def known(context: Context) -> dict[str, float]:
    """Those of the peaks stage; measured now where it did not run."""
    found = context.previous.get("peaks", {})
    if "copy_gb_per_s" in found and "bf16_tflop_per_s" in found and not context.rehearse:
        return found
    peaks = measure(context)
    context.record("peaks", peaks)
    return peaks
