"""A start for power iteration: Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import Geometry, decode
from .linear_map import compute_dtype, matvec, rmatvec

_EXHAUSTED = 2e-6  # a new direction below this share of what it was before orthogonalisation is rounding


def lanczos_start(
    weights: Sequence[Tensor], starts: Sequence[Tensor], geometry: Sequence[int], n_iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The leading singular vectors of every operator in the Krylov space of ``n_iterations`` steps from ``starts``.

    Golub and Kahan 1965. One cold power iteration is 53-78 % low; 15 of these steps are within 0.5 % as a rule. Groups
    of a convolution are independent operators, each with its own unit pair; a zero or non-finite one gets equal ones.

    Args:
        weights, geometry: as in ``power_step``.
        starts: per operator the vector to start from, on the side where power iteration starts: (Cin, *input_size) of a
            convolution, (out,) of a matrix. Not zero in any group.

    Returns:
        Lists of u (Cout, *output_size) and v (Cin, *input_size), in float32 at least.
    """
    pairs = [_leading(w, x, g, n_iterations) for w, x, g in zip(weights, starts, decode(geometry), strict=True)]
    return [u for u, _ in pairs], [v for _, v in pairs]


def _leading(weight: Tensor, start: Tensor, geometry: Geometry, n_iterations: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(weight, start)
    weight = weight.to(dtype)
    there, back = (matvec, rmatvec) if geometry.axes else (rmatvec, matvec)
    shapes = geometry.in_shape(weight.shape), geometry.out_shape(weight.shape)
    start_shape, image_shape = shapes if geometry.axes else shapes[::-1]
    # Squares must neither under- nor overflow; the vectors do not depend on the scale.
    largest = weight.abs().amax()
    weight = weight / torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)
    groups = geometry.groups
    basis = [_unit(start.to(dtype).reshape(groups, -1), [])[0]]
    images: list[Tensor] = []
    diagonal, off_diagonal = [], []
    for j in range(n_iterations):
        image = there(basis[j].reshape(1, *start_shape), weight, geometry).reshape(groups, -1)
        unit, length = _unit(image, images)
        images.append(unit)
        diagonal.append(length)
        if j + 1 < n_iterations:
            direction = back(unit.reshape(1, *image_shape), weight, geometry).reshape(groups, -1)
            unit, length = _unit(direction, basis)
            basis.append(unit)
            off_diagonal.append(length)
    matrix = torch.diag_embed(torch.stack(diagonal, dim=1))
    if off_diagonal:
        matrix = matrix + torch.diag_embed(torch.stack(off_diagonal, dim=1), offset=1)
    alive = (matrix.isfinite().all(dim=2).all(dim=1)) & (matrix.amax(dim=(1, 2)) > 0)
    left, _, right = torch.linalg.svd(torch.where(alive[:, None, None], matrix, 0.0))
    start_side = torch.einsum("gj,jgn->gn", right[:, 0, :], torch.stack(basis))
    image_side = torch.einsum("gj,jgm->gm", left[:, :, 0], torch.stack(images))
    start_side, image_side = (
        torch.where(alive[:, None], x, x.shape[1] ** -0.5).reshape(shape).contiguous()
        for x, shape in ((start_side, start_shape), (image_side, image_shape))
    )
    return (image_side, start_side) if geometry.axes else (start_side, image_side)


def _unit(x: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Each row of ``x`` made orthogonal to the basis and a unit vector, and its length; 0 where nothing is left."""
    before = torch.linalg.vector_norm(x, dim=1)
    for _ in range(2 if basis else 0):
        stacked = torch.stack(basis)
        x = x - torch.einsum("jg,jgn->gn", torch.einsum("jgn,gn->jg", stacked, x), stacked)
    length = torch.linalg.vector_norm(x, dim=1)
    length = torch.where(length <= _EXHAUSTED * before, torch.zeros_like(length), length)
    alive = (length != 0)[:, None]
    return torch.where(alive, x / torch.where(alive, length[:, None], 1.0), 0.0), length
