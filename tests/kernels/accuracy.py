"""The judge of the kernels' accuracy: about as near to float64 as PyTorch's own float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24  # of float32


def judge(
    found: Sequence[Tensor],
    function: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor],
    groups: Sequence[int],
    factor: float = 2.0,
    cuts: float = 0.0,
) -> Sequence[Tensor]:
    """Compare with ``function`` in float64 and return its results; errors are relative, the largest over the groups.

    Allowed is ``factor`` times the error of ``function`` in float32. That is luck where there is little to add up (0 at
    best), so twice what rounding the operands alone does to the result comes on top (the largest of a few draws of
    relative errors of up to one unit roundoff: a sum that cancels suffers, whoever computes it), and the roundings that
    all elements share: of the two norms and of sigma. ``cuts`` is allowed on top, as of
    tensor cores' sums (tensor_cores.py).
    """
    exact = function(*(x.double() for x in operands))
    yardstick = _errors(function(*(x.float() for x in operands)), exact, groups)
    generator = torch.Generator().manual_seed(1)
    noise = [0.0] * len(exact)
    for _ in range(3):
        moved = [
            x.double() * (1 + UNIT_ROUNDOFF * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))
            for x in operands
        ]
        noise = list(map(max, noise, _errors(function(*moved), exact, groups)))
    for i, error in enumerate(_errors(found, exact, groups)):
        allowed = factor * yardstick[i] + 2 * noise[i] + 3 * UNIT_ROUNDOFF + cuts
        assert error <= allowed, (
            f"result {i}: error {error:.3g}, PyTorch's {yardstick[i]:.3g}, noise {noise[i]:.3g}, cuts {cuts:.3g}"
        )
    return exact


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor], groups: Sequence[int]) -> list[float]:
    errors = []
    for a, b, n in zip(found, exact, groups, strict=True):
        assert a.shape == b.shape
        difference = (a.double() - b).reshape(n, -1).norm(dim=1)
        size = b.reshape(n, -1).norm(dim=1).clamp(min=1e-300)
        errors.append(float((difference / size).max()))
    return errors


def round_operands(precision: str, *operands: Tensor) -> list[Tensor]:
    """As matrix instructions read them: bf16 to even, tf32 to 10 bits behind the point, ties away from zero."""
    if precision == "bf16":
        return [x.bfloat16().float() for x in operands]
    if precision == "tf32":
        return [((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in operands]
    return list(operands)
