"""Operators of normalisation and its gradient, and the autograd function that joins them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..reference import normalize as _reference
from ..reference.eager import is_readable
from ..reference.geometry import Geometry, decode
from .layout import Layout
from .library import define, dtype_code, has_kernels, stream_of
from .plan import GradientPlan
from .precision import PRECISIONS, resolved
from .records import is_dense

_LEAST_BUDGET = 1 << 20  # elements of partial sums that are always allowed: 4 MB


def _normalize_kernel(
    module: ModuleType,
    weights: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    betas: Sequence[float],
    caps: Sequence[bool],
) -> list[Tensor]:
    return _normalize_into(module, None, weights, sigmas, betas, caps)


def _normalize_in_place_kernel(
    module: ModuleType,
    weights: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    betas: Sequence[float],
    caps: Sequence[bool],
) -> None:
    for weight, result in zip(weights, _normalize_into(module, weights, weights, sigmas, betas, caps)):
        if result is not weight:
            weight.copy_(result)
    _note_writes(weights)


def _note_writes(weights: Sequence[Tensor]) -> None:
    """Below autograd no write counts by itself."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([w for w in weights if not w.is_inference()])


def _normalize_into(
    module: ModuleType,
    targets: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    betas: Sequence[float],
    caps: Sequence[bool],
) -> list[Tensor]:
    """The normalised weights, in ``targets`` where these are dense."""
    results: list[Tensor] = []
    dense: list[Tensor] = []  # kept until the launch: some are copies
    arguments = []
    for i, (weight, sigma, beta, cap) in enumerate(zip(weights, sigmas, betas, caps, strict=True)):
        if weight.device != weights[0].device:
            raise ValueError(f"normalize: weights are on {weights[0].device} and on {weight.device}; give one device's")
        if sigma.device != weight.device:
            raise ValueError(f"normalize: sigma is on {sigma.device}, its weight on {weight.device}; move one of them")
        _check_scalar("normalize", sigma)
        code = dtype_code(weight)
        if code is None or sigma.dtype != torch.float32:
            results.append(_reference.normalize(weight, sigma, beta, cap))
            continue
        result = torch.empty_like(weight) if targets is None or not is_dense(targets[i]) else targets[i]
        dense.append(_laid_out_as(result, weight))
        results.append(result)
        addresses = dense[-1].data_ptr(), result.data_ptr(), sigma.data_ptr()
        arguments.append((*addresses, weight.numel(), beta, cap, code))
    if arguments:
        module.normalize(arguments, stream_of(weights[0].device))
    return results


def _laid_out_as(result: Tensor, t: Tensor) -> Tensor:
    """``t`` in the layout of ``result``, which is dense: as it is, or a copy (of a slice, an expanded tensor, ...)."""
    return t if t.stride() == result.stride() else torch.empty_like(result, dtype=t.dtype).copy_(t)


def _check_scalar(operator: str, sigma: Tensor) -> None:
    if sigma.numel() != 1:
        raise ValueError(f"{operator}: sigma has shape {tuple(sigma.shape)}, a scalar is needed")


_normalize = define(
    "normalize(Tensor[] weights, Tensor[] sigmas, float[] betas, bool[] caps) -> Tensor[]",
    _reference.normalize_all,
    lambda weights, sigmas, betas, caps: [torch.empty_like(w) for w in weights],
    _normalize_kernel,
)


def _normalize_in_place(
    weights: Sequence[Tensor], sigmas: Sequence[Tensor], betas: Sequence[float], caps: Sequence[bool]
) -> None:
    for weight, result in zip(weights, _reference.normalize_all(weights, sigmas, betas, caps)):
        weight.copy_(result)
    _note_writes(weights)


normalize_ = define(
    "normalize_(Tensor(a!)[] weights, Tensor[] sigmas, float[] betas, bool[] caps) -> ()",
    _normalize_in_place,
    lambda weights, sigmas, betas, caps: None,
    _normalize_in_place_kernel,
)
"""``normalize_all`` of weights where they are: a projection, in one launch where there are kernels."""


def _backward_reference(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Laid out as the weight, which is what autograd wants of its gradient."""
    return torch.empty_like(weight, dtype=grad.dtype).copy_(_reference.normalize_backward(grad, weight, *rest))


def _normalize_backward_kernel(
    module: ModuleType,
    grad: Tensor,
    weight: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    group: Tensor | None,
    geometry: Sequence[int],
    beta: float,
    cap: bool,
    precision: str = "fp32",
) -> Tensor:
    precision = resolved(precision)
    device = weight.device
    for name, t in (("grad", grad), ("sigma", sigma), ("u", u), ("v", v), ("group", group)):
        if t is not None and t.device != device:
            raise ValueError(f"normalize_backward: {name} is on {t.device}, the weight on {device}; move one of them")
    if grad.shape != weight.shape:
        raise ValueError(f"normalize_backward: grad has shape {tuple(grad.shape)}, the weight {tuple(weight.shape)}")
    result = torch.empty_like(weight, dtype=grad.dtype)
    weight, grad = _laid_out_as(result, weight), _laid_out_as(result, grad)
    known, shapes, layout = _layout(tuple(geometry), weight.shape, weight.stride(), weight.dtype)
    for name, t, shape in zip("uv", (u, v), shapes):
        if t.shape != shape:
            raise ValueError(f"normalize_backward: {name} has shape {tuple(t.shape)}, the operator needs {shape}")
    _check_scalar("normalize_backward", sigma)
    floats = all(t.dtype == torch.float32 for t in (sigma, u, v))
    grad_code = dtype_code(grad)
    every_group = known.groups > 1 and group is None  # whose sums would share their places
    if layout is None or grad_code is None or not floats or every_group or max(u.numel(), v.numel()) >= 2**31:
        return _backward_reference(grad, weight, sigma, u, v, group, geometry, beta, cap, precision)
    u, v = u.contiguous(), v.contiguous()
    group = None if group is None else group.to(torch.int64)
    plan = _plan(module, layout, device, max(_LEAST_BUDGET, u.numel() + v.numel()))
    # In terms of the convolution that describes the layer: x is its input, y its output.
    x, y = (u, v) if known.transposed else (v, u)
    # One allocation: the inner product's partial sums (float64, so first), the split sums', and counters.
    n_inner = module.normalize_backward_blocks(weight.numel())
    n_inner += n_inner % 2  # parts of split sums are moved in 16 bytes
    scratch = torch.empty(2 * n_inner + plan.partial_size + plan.n_counters, dtype=torch.float32, device=device)
    inner = scratch.data_ptr()
    partials = inner + 8 * n_inner
    counters = partials + 4 * plan.partial_size
    module.normalize_backward(
        (grad.data_ptr(), weight.data_ptr(), result.data_ptr()),
        (grad_code, layout.dtype),
        weight.numel(),
        sigma.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        0 if group is None else group.data_ptr(),
        plan.tables.addresses(),
        (inner, partials, counters),
        plan.sizes,
        beta,
        cap,
        PRECISIONS.index(precision),
        stream_of(device),
    )
    return result


@functools.lru_cache(maxsize=4096)
def _layout(
    geometry: tuple[int, ...], shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype
) -> tuple[Geometry, tuple[tuple[int, ...], tuple[int, ...]], Layout | None]:
    """The geometry, the shapes of u and v, and the layout of a weight."""
    (known,) = decode(geometry)
    layout = Layout.of(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), known)
    return known, (known.out_shape(shape), known.in_shape(shape)), layout


@functools.lru_cache(maxsize=4096)
def _plan(module: ModuleType, layout: Layout, device: torch.device, budget: int) -> GradientPlan:
    return GradientPlan(layout, device, module.parallel_blocks(stream_of(device)[1]), budget)


_normalize_backward = define(
    "normalize_backward(Tensor grad, Tensor weight, Tensor sigma, Tensor u, Tensor v, Tensor? group, int[] geometry,"
    " float beta, bool cap, str precision='fp32') -> Tensor",
    _backward_reference,
    lambda grad, weight, *_: torch.empty_like(weight, dtype=grad.dtype),
    _normalize_backward_kernel,
)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        group: Tensor | None,
        geometry: Sequence[int],
        beta: float,
        cap: bool,
        precision: str,
        ready: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(weight, sigma, u, v, group)
        ctx.geometry, ctx.beta, ctx.cap, ctx.precision = geometry, beta, cap, precision
        if ready:
            return ready[0]
        if is_readable(weight, sigma) and not has_kernels(weight.device):
            return _reference.normalize(weight, sigma, beta, cap)
        return _normalize([weight], [sigma], [beta], [cap])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].to_dense() if grads[0].is_sparse else grads[0]  # an Embedding can ask for sparse gradients
        weight, sigma, u, v, group = ctx.saved_tensors
        beta, cap = ctx.beta, ctx.cap
        if torch.is_grad_enabled():  # double backward: the same value, from operations that autograd can follow
            value = _reference.rayleigh(weight, u, v, group, *decode(ctx.geometry))
            output = _reference.normalize(weight, value, beta, cap)
            (grad_weight,) = torch.autograd.grad(output, weight, grad, create_graph=True)
        elif is_readable(grad, weight) and not has_kernels(weight.device):
            grad_weight = _reference.normalize_backward(grad, weight, sigma, u, v, group, ctx.geometry, beta, cap)
        else:
            grad_weight = _normalize_backward(grad, weight, sigma, u, v, group, ctx.geometry, beta, cap, ctx.precision)
        return grad_weight, *(None,) * 9


def normalize(
    weight: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    group: Tensor | None,
    geometry: Sequence[int],
    beta: float,
    cap: bool,
    precision: str = "fp32",
    ready: Tensor | None = None,
) -> Tensor:
    """The normalised weight; its gradient holds u and v constant and flows through sigma = <u, A v>.

    ``ready`` is the normalised weight where ``normalize_all`` has computed it. See ``reference.normalize`` for the
    formulas and ``reference.power.power_step`` for the shapes.
    """
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        # torch.func and forward-mode AD follow plain operations: sigma, with the derivative of <u, A v>.
        value = _reference.rayleigh(weight, u, v, group, *decode(geometry))
        return _reference.normalize(weight, value + (sigma - value).detach(), beta, cap)
    given = [] if ready is None else [ready]
    return _Normalize.apply(weight, sigma, u, v, group, geometry, beta, cap, precision, given)


normalize_all = _normalize
"""The normalised weights of many layers, outside autograd, in one launch where there are kernels."""
