"""The operator of projection: power iteration of plain weights, and the weights scaled back in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..reference.geometry import decode
from ..reference.normalize import divisor
from .library import define
from .normalize import normalize_
from .power_step import power_step
from .records import is_on_host
from .refresh import copy

MOST_ITERATIONS = 30
"""Of one step with a tolerance."""

State = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]  # u, v and sigma of every weight


def repeated(step: Callable[[State], State], state: State, n_iterations: int, tol: float | None) -> State:
    """``n_iterations`` times ``step``; with ``tol`` more, until sigma moves by at most tol * sigma, weight by weight.

    The device chooses which weights go on, so nothing waits for it; only on the host the loop ends early. The first
    iteration says nothing of convergence: the sigma before it is that of another weight.
    """
    state = step(state)
    if tol is None:
        for _ in range(n_iterations - 1):
            state = step(state)
        return state
    going = [torch.ones_like(s, dtype=torch.bool) for s in state[2]]
    for i in range(1, max(n_iterations, MOST_ITERATIONS)):
        found = step(state)
        moved = [(new - old).abs() > tol * new for new, old in zip(found[2], state[2])]
        state = (
            [torch.where(g, new, old) for g, new, old in zip(going, found[0], state[0])],
            [torch.where(g, new, old) for g, new, old in zip(going, found[1], state[1])],
            [torch.where(g, new, old) for g, new, old in zip(going, found[2], state[2])],
        )
        if i + 1 >= n_iterations:
            going = [g & m for g, m in zip(going, moved)]
            if is_on_host(going[0].device) and not bool(torch.stack(going).any()):
                break
    return state


def iterate(
    weights: Sequence[Tensor],
    state: State,
    rows: Sequence[int],
    geometry: Sequence[int],
    n_iterations: int,
    tol: float | None,
    precision: str,
) -> State:
    """Power iterations of whole weights, each from v: u = A v / |A v|, w = A^T u, sigma = |w|, v = w / sigma.

    Arguments as of ``project_weights``.
    """
    matrices = [not layer.axes for layer in decode(geometry)]
    # Of a matrix the operator starts from u: so that of its transpose starts from v.
    operands = [as_matrix(w, r).T if flat else w for w, r, flat in zip(weights, rows, matrices)]

    def step(state: State, n: int = 1) -> State:
        us, vs = _sides(matrices, state[0], state[1])
        us, vs, sigmas, _ = power_step(operands, us, vs, geometry, n, precision)
        return *_sides(matrices, us, vs), sigmas

    if tol is None:
        return step(state, n_iterations)
    return repeated(step, state, n_iterations, tol)


def as_matrix(weight: Tensor, rows: int) -> Tensor:
    """The weight as a matrix whose rows are given by its dimension ``rows``."""
    return weight if weight.ndim == 2 and rows == 0 else weight.movedim(rows, 0).flatten(1)


def _sides(matrices: Sequence[bool], us: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """u and v, exchanged where the operator is the transpose."""
    pairs = [(v, u) if flat else (u, v) for flat, u, v in zip(matrices, us, vs)]
    return [u for u, _ in pairs], [v for _, v in pairs]


def scale(weights: Sequence[Tensor], sigmas: Sequence[Tensor], betas: Sequence[float], caps: Sequence[bool]) -> None:
    """W <- W / max(1, sigma / beta) (``caps``), else beta W / sigma, in place; then sigma is that of the new weight.

    A weight with elements that are not finite has no norm, and stays as it is.
    """
    known = [torch.where(s.isfinite(), s, 0.0) for s in sigmas]
    here = [i for i, w in enumerate(weights) if w.numel()]  # a process can hold nothing of a sharded weight
    normalize_(*([column[i] for i in here] for column in (weights, known, betas, caps)))
    copy(sigmas, [s / divisor(k, beta, cap) for s, k, beta, cap in zip(sigmas, known, betas, caps)])


def _project_weights(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    rows: Sequence[int],
    geometry: Sequence[int],
    betas: Sequence[float],
    caps: Sequence[bool],
    n_iterations: int,
    tol: float | None = None,
    precision: str = "fp32",
) -> None:
    """Advance u, v and sigma of every weight, and scale the weights by them (Gouk et al. 2021, algorithm 2).

    Args:
        weights: of the layers, written: (Cout, Cin / groups, *kernel), transposed (Cin, Cout / groups, *kernel), or of
            any shape whose matrix (see ``rows``) is the operator.
        us, vs: per weight the left (Cout, *output_size) and right (Cin, *input_size) vector, written.
        sigmas: scalars, written: the norms of the weights as they are afterwards.
        rows: per weight the dimension that gives the rows of its matrix; not read for convolutions.
        geometry: the operators' geometries, encoded one after the other; no axes: a matrix.
        betas, caps: per weight beta, and whether it is the largest norm allowed or the norm wanted.
        n_iterations, tol: see ``repeated``.
        precision: as in ``power_step``.
    """
    with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
        weights = [w.detach() for w in weights]
        found = iterate(weights, (us, vs, sigmas), rows, geometry, n_iterations, tol, precision)
        copy([*us, *vs, *sigmas], [*found[0], *found[1], *found[2]])
        scale(weights, sigmas, betas, caps)


project_weights = define(
    "project_weights(Tensor(a!)[] weights, Tensor(b!)[] us, Tensor(c!)[] vs, Tensor(d!)[] sigmas, int[] rows,"
    " int[] geometry, float[] betas, bool[] caps, int n_iterations, float? tol=None, str precision='fp32') -> ()",
    _project_weights,
    lambda *args: None,
)
