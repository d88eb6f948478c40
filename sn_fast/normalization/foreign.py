"""Weights that are not the module's own: given by torch.func.functional_call, stacked in an ensemble, made in a graph.

They are normalised by their own norm, found from the module's vectors as a start, and leave the state as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.singular_vectors import singular_vectors
from ..reference.normalize import normalize, rayleigh
from ..reference.power import sigma_through_last_iteration
from .certify import certified_norm
from .state import State


def normalize_foreign(member: State, operand: Tensor) -> Tensor:
    """The normalised operand; the gradient holds the singular vectors constant and flows through sigma = <u, A v>.

    In plain operations: autograd functions lose their backward where torch.compile traces torch.func transforms.
    """
    options, geometry = member.options, member.known_geometry
    weight = operand.detach()
    u, v = (_on(member.state(name), weight) for name in ("u", "v"))
    (u,), (v,), (group,) = singular_vectors([weight], [u], [v], member.code, options.product_precision)
    if options.full:
        sigma = sigma_through_last_iteration(operand, u if member.as_matrix else v, geometry)
    else:
        sigma = rayleigh(operand, u, v, group if geometry.groups > 1 else None, geometry)
    if options.bound:  # the gradient of the bound, as far as the bound follows the norm in proportion
        norm = sigma.detach()
        sigma = sigma * torch.where(norm > 0, certified_norm(member, weight) / torch.where(norm > 0, norm, 1.0), 1.0)
    return normalize(operand, sigma, options.beta, options.cap)


def _on(vector: Tensor, weight: Tensor) -> Tensor:
    """The module's vector on the weight's device; zeros where the module itself has no memory."""
    return weight.new_zeros(vector.shape, dtype=vector.dtype) if vector.is_meta else vector.to(weight.device)
