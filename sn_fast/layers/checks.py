"""Whether a user's products are those of one linear map and its adjoint."""

from __future__ import annotations

import math

import torch

from .applying import apply, apply_adjoint, probe, takes_batches_of_any_dtype, visible
from .operators import LinearOperator, leaves_of
from .protocol import check_attributes


def check_products(op: LinearOperator) -> None:
    """Raise where a user's products are visibly not those of one linear map and its adjoint."""
    for leaf in leaves_of(op):
        check_attributes(leaf)
        if takes_batches_of_any_dtype(leaf):
            continue
        with torch.no_grad():
            _check_leaf(leaf)


def _check_leaf(op: LinearOperator) -> None:
    name, tolerance = type(op).__name__, visible(op.dtype, torch.device(op.device))
    dtype = torch.promote_types(op.dtype, torch.float32)
    x = probe(3, tuple(op.in_shape), dtype, op.device, seed=2)
    y = probe(3, tuple(op.out_shape), dtype, op.device, seed=3)
    x[2] = -2 * (x[0] + x[1])
    forward, back = apply(op, x), apply_adjoint(op, y)
    for what, image in (("matvec", forward), ("rmatvec", back)):
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"{name}.{what} of a random vector has NaN or infinite elements; the norm is not defined")
    defect = (forward[2] + 2 * (forward[0] + forward[1])).abs().max()
    if bool(defect > tolerance * forward.abs().max()):
        raise ValueError(f"{name}.matvec is not linear: A(-2 (x + y)) differs from -2 (A x + A y)")
    there = forward.double().flatten(1) @ y.double().flatten(1).T  # <A x_i, y_j>
    here = x.double().flatten(1) @ back.double().flatten(1).T
    # Of random vectors a product is about |A x| |y| / sqrt(m).
    size = torch.maximum(there.abs().max(), here.abs().max())
    size = torch.maximum(size, forward.double().norm() * y.double().norm() / 9 / math.sqrt(y[0].numel()))
    if bool((there - here).abs().max() > tolerance * size):
        raise ValueError(
            f"{name}.rmatvec is not the adjoint of matvec: <A x, y> = {float(there[0, 0]):.6g} but <x, A^T y> = "
            f"{float(here[0, 0]):.6g} for random x and y"
        )
