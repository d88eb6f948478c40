"""One call of every operator for each way that its kernels work: run, judged, sanitized, captured and repeated."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sn_fast
from sn_fast.layers import LayerOperator
from sn_fast.norms.estimate import start_vectors
from sn_fast.ops import normalize as _normalize_ops  # noqa: F401 - registers the operators
from sn_fast.ops import pgd_step as pgd_ops
from sn_fast.ops import random_start as start_ops
from sn_fast.ops import refresh as _refresh_ops  # noqa: F401
from sn_fast.ops import wrm_step as wrm_ops
from sn_fast.ops.fingerprint import _fingerprint as _fingerprint_reference
from sn_fast.ops.fingerprint import fingerprint
from sn_fast.ops.power_step import PRECISIONS
from sn_fast.reference.geometry import decode

ROOT = Path(__file__).parents[2]

_FLOAT32, _HALF, _BFLOAT16 = 3e-6, 2e-3, 1.6e-2
TOLERANCE = {torch.float32: _FLOAT32, torch.float16: _HALF, torch.bfloat16: _BFLOAT16}
_OF_PRECISION = {"fp32": _FLOAT32, "3xtf32": _FLOAT32, "tf32": 2e-3, "bf16": 1.6e-2}


@dataclass
class Case:
    """``op(*args)``; the same call with every floating tensor in float64 goes to the reference, and is the truth."""

    name: str
    op: Any
    args: tuple[Any, ...]
    tolerance: float
    opcheck: bool = False

    def run(self) -> list[Tensor]:
        """The results, as a flat list."""
        return tensors(self.op(*self.args))

    def error(self, found: list[Tensor]) -> float:
        """The largest error of any result, relative to that result's largest element."""
        exact = tensors(self.op(*_in_float64(self.args)))
        errors = [0.0]
        for a, b in zip(found, exact, strict=True):
            if b.is_floating_point() and b.numel():
                scale = b.abs().max().clamp(min=1e-30)
                difference = ((a.double() - b).abs().max() / scale).item()
                errors.append(difference if difference == difference else float("inf"))
        return max(errors)


class HashCase(Case):
    """Integers, which are the reference's or wrong."""

    def error(self, found: list[Tensor]) -> float:
        """0, or infinite."""
        exact = [_fingerprint_reference(w) for w in self.args[0]]
        return 0.0 if all(map(torch.equal, found, exact)) else math.inf


def all_cases(device: str, small: bool = False) -> list[Case]:
    """Every case, on ``device``; ``small``: for an emulator or a sanitizer."""
    torch.manual_seed(0)
    spectral = [*_power_steps(device, small), *_refreshes(device, small), *_lanczos(device, small)]
    spectral += _normalizations(device, small)
    return [*spectral, *_updates(device, small)]


def kernel_names() -> set[str]:
    """The kernels in csrc/, by their names in the sources."""
    text = "\n".join(p.read_text() for p in (ROOT / "csrc").rglob("*.cuh"))
    return set(re.findall(r"__global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(", text))


# -- spectral ---------------------------------------------------------------------------------------------------------


def _operators(device: str, dtype: torch.dtype, small: bool) -> dict[str, LayerOperator]:
    """Of every kind of tile (dot, axpy, direct, both GEMMs), sums whole and split, groups, every sort of geometry."""

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    n = 1 if small else 4
    return {
        "linear": sn_fast.MatrixOperator(weight(33 * n, 520 * n)),
        "first layer": sn_fast.ConvOperator(weight(16 * n, 3, 3, 3), (8 * n, 9 * n), padding=1),
        "3x3": sn_fast.ConvOperator(weight(70, 24 * n, 3, 3), (12, 11), padding=1),
        "few positions": sn_fast.ConvOperator(weight(72, 40 * n, 3, 3), (4, 4), padding=1),
        "strided": sn_fast.ConvOperator(weight(66, 18 * n, 3, 3), (13, 12), stride=2, padding=1),
        "1x1": sn_fast.ConvOperator(weight(40 * n, 36, 1, 1), (1, 1)),
        "dilated groups": sn_fast.ConvOperator(weight(36, 9, 3, 3), (10, 10), padding=2, dilation=2, groups=2),
        "reflect": sn_fast.ConvOperator(weight(20, 12, 3, 3), (9, 8), padding=1, padding_mode="reflect"),
        "transposed": sn_fast.ConvOperator(weight(24, 20, 4, 4), (5, 6), stride=2, padding=1, transposed=True),
        "1d": sn_fast.ConvOperator(weight(20, 8, 5), (40,), padding=2, padding_mode="circular"),
        "3d": sn_fast.ConvOperator(weight(12, 10, 3, 3, 3), (5, 4, 6), padding=1),
        # Sums long enough to be split, of each kind.
        "long rows": sn_fast.MatrixOperator(weight(12, 60000)),
        "long sums": sn_fast.ConvOperator(weight(64, 700, 3, 3), (4, 4), padding=1),
        "long sums, many positions": sn_fast.ConvOperator(weight(64, 500, 3), (64,), padding=1),
        "long sums, few rows": sn_fast.ConvOperator(weight(4, 800, 3), (40,), padding=1),
    }


def _power_steps(device: str, small: bool) -> Iterator[Case]:
    op = torch.ops.sn_fast.power_step.default
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operators = list(_operators(device, dtype, small).values())
        us = [torch.randn(o.out_shape, device=device) for o in operators]
        vs = [torch.randn(o.in_shape, device=device) for o in operators]
        code = [c for o in operators for c in o.geometry.encode()]
        for precision in PRECISIONS if dtype == torch.float32 else ("fp32", "bf16"):
            args = ([o.weight for o in operators], us, vs, code, 2, precision)
            name = f"power_step, {_short(dtype)} weights, {precision}"
            yield Case(name, op, args, _OF_PRECISION[precision], opcheck=dtype == torch.float32 and precision == "fp32")


def _refreshes(device: str, small: bool) -> Iterator[Case]:
    for dtype in TOLERANCE:
        operators = list(_operators(device, dtype, small).values())
        weights = [o.weight for o in operators]
        yield HashCase(f"fingerprint, {_short(dtype)}", _fingerprints, (weights,), 0.0)
        us = [torch.randn(o.out_shape, device=device) for o in operators]
        vs = [torch.randn(o.in_shape, device=device) for o in operators]
        args = (weights, us, vs, [c for o in operators for c in o.geometry.encode()])
        yield Case(f"refresh, {_short(dtype)}", _refreshed, args, _FLOAT32)


def _fingerprints(weights: list[Tensor]) -> list[Tensor]:
    return [fingerprint(w) for w in weights]


def _refreshed(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], code: list[int]) -> list[Tensor]:
    """u, v and sigma after the weights have changed: every other one, so the rest stays."""
    us, vs = [u.clone() for u in us], [v.clone() for v in vs]
    sigmas = [torch.zeros((), dtype=u.dtype, device=u.device) for u in us]
    groups = [torch.zeros((), dtype=torch.int64, device=us[0].device) for g in decode(code) if g.groups > 1]
    records = [fingerprint(w) for w in weights]
    for record in records[::2]:
        record[:1] += 1
    changed = torch.zeros(len(us), dtype=torch.bool, device=us[0].device)
    torch.ops.sn_fast.refresh(weights, us, vs, sigmas, groups, [], records, [], changed, code, 1)
    return [*us, *vs, *sigmas]


def _lanczos(device: str, small: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        operators = list(_operators(device, dtype, small).values())
        shapes = [o.in_shape if o.geometry.axes else o.out_shape for o in operators]
        starts = [torch.randn(shape, device=device) for shape in shapes]
        args = ([o.weight for o in operators], starts, [c for o in operators for c in o.geometry.encode()], 6)
        op = torch.ops.sn_fast.lanczos_start.default
        # Vectors of an unconverged pair: rounding grows with the inverse of the gap to the next one.
        yield Case(f"lanczos_start, {_short(dtype)} weights", op, args, 1e-4, opcheck=dtype == torch.float32)


def _normalizations(device: str, small: bool) -> Iterator[Case]:
    for dtype in TOLERANCE:
        operators = _operators(device, dtype, small)
        weights = [o.weight for o in operators.values()]
        sigmas = [torch.rand((), device=device) + 0.7 for _ in weights]
        caps = [i % 2 == 0 for i in range(len(weights))]
        args: tuple[Any, ...] = (weights, sigmas, [1.0] * len(weights), caps)
        forward = torch.ops.sn_fast.normalize.default
        yield Case(f"normalize, {_short(dtype)}", forward, args, TOLERANCE[dtype], opcheck=dtype == torch.float32)
        backward = torch.ops.sn_fast.normalize_backward.default
        for name, o in operators.items():
            u, v = start_vectors(LayerOperator(o.weight.float(), o.geometry), 2)
            group = torch.ones((), dtype=torch.int64, device=device) if o.geometry.groups > 1 else None
            sigma, code = torch.rand((), device=device) + 1.5, o.geometry.encode()
            args = (torch.randn_like(o.weight), o.weight, sigma, u, v, group, code, 0.7, True)
            checked = dtype == torch.float32 and name in ("3x3", "dilated groups")
            yield Case(
                f"normalize_backward, {_short(dtype)}, {name}", backward, args, 3 * TOLERANCE[dtype], opcheck=checked
            )


# -- attacks ----------------------------------------------------------------------------------------------------------

NORMS = ("inf", "2", "1", "1-exact")


def _updates(device: str, small: bool) -> Iterator[Case]:
    sizes = {"on chip": (3, 3, 10, 11), "in tiles": (2, 3, 80, 90) if small else (3, 3, 224, 224)}
    for size, shape in sizes.items():
        for dtype, tolerance in TOLERANCE.items():
            x = torch.rand(shape, device=device).to(dtype)
            x_adv = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
            grad = torch.randn_like(x)
            lower, upper = torch.zeros((), device=device), torch.ones((3, 1, 1), device=device)
            eps = {"inf": 0.03, "2": 1.0, "1": 20.0, "1-exact": 20.0}
            label = f"{_short(dtype)}, {size}"
            checked = dtype == torch.float32 and size == "on chip"
            ends = (lower, upper)
            for norm in NORMS:
                e = eps[norm]
                args: tuple[Any, ...] = (x_adv, x, grad, norm, e, e / 4, None, None, *ends, False, None)
                yield Case(f"pgd_step {norm}, {label}", pgd_ops.pgd_step, args, tolerance, opcheck=checked)
                if norm == "1-exact":  # another kernel
                    args = (x_adv, x, grad, norm, e, e / 4, *[None] * 4, False, None)
                    yield Case(f"pgd_step {norm} without clip, {label}", pgd_ops.pgd_step, args, tolerance)
                args = (x_adv, x, norm, e, None, *ends)
                yield Case(f"project {norm}, {label}", pgd_ops.project, args, tolerance)
                args = (x, norm, e, None, *ends, torch.tensor(12345678901, device=device))
                yield Case(f"random_start {norm}, {label}", start_ops.random_start, args, tolerance)
            args = (x_adv, x, grad, 0.1, None, 0.5, *ends)
            yield Case(f"wrm_step, {label}", wrm_ops.wrm_step, args, tolerance, opcheck=checked)


# -- plumbing ---------------------------------------------------------------------------------------------------------


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(result: Any) -> list[Tensor]:
    """All tensors of an operator's result, in a flat list."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)]


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(_in_float64(v) for v in value) if isinstance(value, (list, tuple)) else value
