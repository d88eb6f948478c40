"""Measuring an operator's norm from below: power iteration, Lanczos, block iteration, or the dense matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Literal, overload

import torch
from torch import Tensor

from ..layers.checks import check_products
from ..layers.operators import LinearOperator, leaves_of, unscaled
from ..layers.protocol import check_attributes
from ..layers.weighted import LayerOperator, as_int, is_dtensor, layer_operator
from ..ops.lanczos import lanczos_start
from ..reference.linear_map import compute_dtype
from .flat import FlatOperator, Triple, combine, dense_matrices, flattened, inner_products, unit

Method = Literal["power", "lanczos", "block", "dense"]

_DEFAULT_MAX_ITERATIONS = {"power": 2000, "lanczos": 400, "block": 1000}
_BLOCK = 4
_WINDOW = 32  # Lanczos vectors kept before a restart
_LOOKING = 12  # iterations after a warm start that look for a larger singular value
_KEPT = 4  # Ritz vectors that a restart keeps


class ConvergenceWarning(UserWarning):
    """An iteration stopped at its limit before it reached the wanted tolerance."""


@overload
def operator_norm(
    op: LinearOperator,
    *,
    method: Method = "lanczos",
    tol: float = 1e-5,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    return_vectors: Literal[False] = False,
) -> Tensor: ...


@overload
def operator_norm(
    op: LinearOperator,
    *,
    method: Method = "lanczos",
    tol: float = 1e-5,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    return_vectors: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def operator_norm(
    op: LinearOperator,
    *,
    method: Method = "lanczos",
    tol: float = 1e-5,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    return_vectors: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of ``op``, estimated from below (exact for "dense").

    Args:
        op: the operator. That of a layer is first reduced exactly (see ``LayerOperator.reduced``).
        method: "power", "lanczos" (full reorthogonalisation; the fastest to converge), "block" (subspace iteration
            with four vectors), or "dense" (SVD of the matrix, small operators only).
        tol: iterations stop when |A^T u - sigma v| <= tol * sigma.
        max_iterations: applications of A and A^T; None: 2000 (power), 400 (lanczos), 1000 (block).
        generator: of the random start; None: a fixed seed, so that equal calls give equal results.
        start: singular vectors (u, v) to start from, those of an earlier call or of a similar weight: u (*out_shape),
            v (*in_shape). "lanczos" and "block" also start from random vectors and spend a few iterations on them,
            in case these belong to a smaller singular value; "power" does not.
        return_vectors: also return the unit singular vectors.

    Returns:
        sigma, a scalar in float32 or float64; or (sigma, u, v) with u (*out_shape), v (*in_shape). A grouped
        convolution's vectors are zero outside the group that attains the norm.

    Raises:
        ValueError: an unknown method, tol <= 0, max_iterations < 1, a weight with NaN or inf, an operator too large
            for "dense", or one whose products are visibly not linear or not each other's adjoint.
        TypeError: ``op`` is not an operator.
    Warns:
        ConvergenceWarning: the iterations ended above ``tol``; the message says how far.
    """
    if method not in ("power", "lanczos", "block", "dense"):
        raise ValueError(f"method={method!r} is unknown; choose 'power', 'lanczos', 'block' or 'dense'")
    check_operator(op)
    check_tolerance(tol)
    if max_iterations is not None:
        max_iterations = as_int("max_iterations", max_iterations, minimum=1)
    with without_autocast(op):
        problem = flattened(op, reduce=True)
        warm = None if start is None else unit(_restricted(op, start).reshape(1, problem.groups, -1))[0]
        if method == "dense":
            triple = _dense(problem)
        else:
            limit = max_iterations or _DEFAULT_MAX_ITERATIONS[method]
            solve = {"power": _power, "lanczos": _lanczos, "block": _block}[method]
            starts = problem.starts(1 if method != "block" else _BLOCK, warm, generator)
            triple = solve(problem, limit, tol, starts, 0 if warm is None else _LOOKING)
            _warn_unless_converged(triple, method, limit, tol)
        sigma, group = triple.sigma.max(dim=0)
        sigma = sigma * problem.scale
        if not return_vectors:
            return sigma
        top = torch.arange(problem.groups, device=sigma.device)[:, None] == group
        u, v = (torch.where(top, x, 0.0) for x in (triple.u, triple.v))
        return sigma, *_lifted(op, u, v)


def check_operator(op: LinearOperator) -> None:
    """Raise unless ``op`` is an operator with finite elements that are here, and its products fit each other."""
    if not isinstance(op, LinearOperator):
        raise TypeError(f"op is a {type(op).__name__}; give an operator: operator_of(layer) or MatrixOperator(weight)")
    for leaf in leaves_of(op):
        check_attributes(leaf)
        layer = layer_operator(leaf)
        if torch.device(leaf.device).type == "meta":
            raise ValueError(f"{leaf} is on the meta device and has no values; load or initialise its weight first")
        if layer is not None and is_dtensor(layer.weight):
            raise ValueError(
                f"the weight of {leaf} is a DTensor, which processes share: give weight.full_tensor(), called on all"
            )
        if layer is not None and not bool(torch.isfinite(layer.weight).all()):
            raise ValueError("the operator's weight has NaN or infinite elements; its norm is not defined")
    check_products(op)


@contextmanager
def without_autocast(op: LinearOperator) -> Iterator[None]:
    """Norms are computed without gradients, in the precision of the operator."""
    with torch.no_grad(), torch.autocast(torch.device(op.device).type, enabled=False):
        yield


def check_tolerance(tol: float) -> None:
    """Raise unless ``tol`` is a positive number."""
    if not isinstance(tol, Real) or not tol > 0:
        raise ValueError(f"tol={tol!r} must be a number > 0")


def start_vectors(op: LayerOperator, n_iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Singular vectors (u, v) of ``op`` after a few Lanczos steps: a warm start for power iteration.

    See ``reference.lanczos.lanczos_start``. The random vector that it starts from is always the same.
    """
    with without_autocast(op):
        weight = op.weight.detach()
        shape = op.in_shape if op.geometry.axes else op.out_shape
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        start = start.to(weight.device, compute_dtype(weight))
        (u,), (v,) = lanczos_start([weight], [start], op.geometry.encode(), n_iterations)
        return u, v


def lift(op: LayerOperator, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors of ``op.reduced()`` as ones of ``op``: placed at one whole window, zero elsewhere."""
    geometry, reduced = op.geometry, op.reduced()
    u, v = u.reshape(reduced.out_shape), v.reshape(reduced.in_shape)
    # Along the axes of the convolution; a transposed one has inputs and outputs swapped.
    outputs, inputs = (v, u) if geometry.transposed else (u, v)
    for i, (axis, window) in enumerate(zip(geometry.axes, geometry.whole_windows())):
        if window is not None:
            positions = torch.tensor(axis.window(window, geometry.mode), device=u.device)
            inputs = _scatter(inputs, 1 + i, positions, axis.size)
            outputs = _scatter(outputs, 1 + i, torch.tensor([window], device=u.device), axis.out)
    return (inputs, outputs) if geometry.transposed else (outputs, inputs)


def _lifted(op: LinearOperator, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of ``flattened(op, reduce=True)`` as those of ``op``."""
    factors, core = unscaled(op)
    layer = layer_operator(core)
    if layer is None:
        return u.reshape(op.out_shape), v.reshape(op.in_shape)
    u, v = lift(layer, u, v)
    return (-u if math.prod(math.copysign(1.0, c) for c in factors) < 0 else u), v


def _restricted(whole: LinearOperator, start: tuple[Tensor, Tensor]) -> Tensor:
    """The right one of two vectors for ``whole``, or for its reduction already, as one for its reduction."""
    op = layer_operator(unscaled(whole)[1])
    shapes = tuple(tuple(t.shape) for t in start)
    fits = {(tuple(whole.out_shape), tuple(whole.in_shape))}
    if op is not None:
        geometry, reduced = op.geometry, op.reduced()
        fits.add((reduced.out_shape, reduced.in_shape))
    if shapes not in fits:
        raise ValueError(f"start has shapes {shapes}, expected u {whole.out_shape} and v {whole.in_shape}")
    if op is None:
        return start[1]
    v = start[1]
    if tuple(v.shape) == reduced.in_shape:
        return v
    for i, (axis, window) in enumerate(zip(geometry.axes, geometry.whole_windows())):
        if window is not None:
            places = [window] if geometry.transposed else axis.window(window, geometry.mode)
            v = v.index_select(1 + i, torch.tensor(places, device=v.device))
    return v


def _scatter(x: Tensor, dim: int, positions: Tensor, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy(dim, positions, x)


def _converged(triple: Triple, tol: float) -> bool:
    return bool(triple.residual.amax() <= tol * triple.sigma.amax())


def _warn_unless_converged(triple: Triple, method: str, limit: int, tol: float) -> None:
    if _converged(triple, tol):
        return
    relative = float(triple.residual.amax() / triple.sigma.amax())
    other = "use method='lanczos' or raise" if method != "lanczos" else "raise"
    warnings.warn(
        f"operator_norm(method={method!r}) stopped after {limit} iterations with |A^T u - sigma v| = "
        f"{relative:.1e} * sigma, above tol={tol:g}; the result is a lower estimate. "
        f"Remedy: {other} max_iterations, or allow a larger tol",
        ConvergenceWarning,
        stacklevel=3,
    )


def _power(problem: FlatOperator, limit: int, tol: float, starts: Tensor, looking: int) -> Triple:
    v = starts[0]
    for _ in range(limit):
        u, value = unit(problem.matvec(v[None]))
        triple, _ = problem.triple(u[0], v, value[0])
        v = triple.v
        if _converged(triple, tol):
            break
    return triple


def _lanczos(problem: FlatOperator, limit: int, tol: float, starts: Tensor, looking: int) -> Triple:
    """Golub-Kahan-Lanczos in Ritz form: expand the basis V by the residual of its best singular pair.

    The residual of the Ritz pair spans the next Krylov direction, so this is Lanczos with full reorthogonalisation;
    the images A V are kept, so an iteration costs one A and one A^T, and a restart keeps the best Ritz vectors.
    """
    basis = orthonormal(starts)
    images = problem.matvec(basis)
    for i in range(limit):
        rotation = ritz_rotation(images)
        # With a warm start the second pair first, which grows from the random start: the warm one may have become, or
        # always been, that of a smaller singular value.
        second = i < min(looking, limit - 1) and basis.shape[0] > 1
        chosen = rotation[:, :, int(second) : int(second) + 1]
        v, image = combine(chosen, basis), combine(chosen, images)
        u, value = unit(image)
        triple, residual = problem.triple(u[0], v[0], value[0])
        if (_converged(triple, tol) and not second) or i == limit - 1:
            break
        if basis.shape[0] >= _WINDOW:
            best = rotation[:, :, :_KEPT]
            basis, images = combine(best, basis), combine(best, images)
        direction = _orthogonal_direction(residual, basis, floor=triple.sigma)
        if direction is None and second:
            looking = 0
            continue
        if direction is None:  # the basis spans an invariant space of every group: nothing is left to gain
            break
        basis = torch.cat([basis, direction])
        images = torch.cat([images, problem.matvec(direction)])
    return triple


def ritz_rotation(images: Tensor) -> Tensor:
    """Coefficients (G, j, j) of the right singular vectors of A restricted to the basis, largest first."""
    gram = inner_products(images, images).double()
    return torch.linalg.eigh(gram).eigenvectors.flip(-1).to(images.dtype)


def _orthogonal_direction(residual: Tensor, basis: Tensor, floor: Tensor) -> Tensor | None:
    """The residual (G, n), orthogonalised twice against the basis; None when rounding is all that is left."""
    norm_before = torch.linalg.vector_norm(residual, dim=1)
    eps = torch.finfo(residual.dtype).eps
    alive = norm_before > eps * floor
    direction = residual[None]
    for _ in range(2):
        direction, _ = unit(direction)
        direction = direction - combine(inner_products(basis, direction), basis)
    direction, norm = unit(direction)
    alive &= norm[0] > 0.1
    return torch.where(alive[:, None], direction, 0.0) if bool(alive.any()) else None


def _block(problem: FlatOperator, limit: int, tol: float, starts: Tensor, looking: int) -> Triple:
    v = orthonormal(starts[: min(problem.n, problem.m)])
    for i in range(limit):
        image = problem.matvec(v)
        rotation = ritz_rotation(image)
        v, image = combine(rotation, v), combine(rotation, image)
        u, value = unit(image[:1])
        triple, _ = problem.triple(u[0], v[0], value[0])
        if _converged(triple, tol) and i >= looking:  # as for Lanczos: the others grow first
            break
        v = orthonormal(problem.rmatvec(image))
    return triple


def orthonormal(v: Tensor) -> Tensor:
    return torch.linalg.qr(v.permute(1, 2, 0)).Q.permute(2, 0, 1)


def _dense(problem: FlatOperator) -> Triple:
    matrices = dense_matrices(problem, "method='dense'", "method='lanczos'")
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return Triple(s[:, 0], u[:, :, 0], vh[:, 0, :], torch.zeros_like(s[:, 0]))
