"""Tensor-parallel matrices: each process iterates on its part of the weight, and sums go over the sharded dimension.

Of an (out, in) matrix W with its rows on several processes, u lies with the rows and v is whole everywhere; with its
columns there, v lies with the columns and u is whole. So A^T u and A v are local products, of which one is summed; and
of the vector that lies in parts, the squared norm is summed. All layers that refresh together share the sums: one of
marks, which tells whether any process has seen a weight move, and two in each iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layers.weighted import is_dtensor
from ..ops import refresh as operators
from ..ops.fingerprint import is_hashed, record_of, renew_record, same_content
from ..ops.normalize import normalize_all
from ..ops.records import REPLACED
from ..ops.refresh import LOCK
from ..ops.singular_vectors import POWER_STEPS
from ..reference.linear_map import compute_dtype
from ..reference.normalize import divisor
from .meeting import meet
from .optimizer_steps import latest
from .parametrization import SpectralNorm
from .snapshot import is_current

_SAME, _MOVED, _LOADED, _OTHER = range(4)  # what a process has seen of a weight; the largest of all counts
_TIGHT = 50  # epsilons that rounding may leave between a state and its weight


class DistributedSpectralNorm(SpectralNorm):
    """Parametrization W -> W / max(1, sigma / beta) of a DTensor; u and v are DTensors in the matching placement."""

    # -- where the parts lie ------------------------------------------------------------------------------------------

    def sharded_dim(self, weight: Any) -> tuple[int, int] | None:
        """The mesh's dimension over which a weight is sharded, and the weight's own; None where it is whole."""
        found = [(i, p.dim) for i, p in enumerate(weight.placements) if p.is_shard()]
        if len(found) > 1 or any(p.is_partial() for p in weight.placements):
            raise RuntimeError(
                f"{self.label()}: its weight is placed as {weight.placements} in its forward; a matrix sharded along "
                "one dimension of a mesh is supported"
            )
        return found[0] if found else None

    def rows_are_sharded(self, weight: Any) -> bool:
        found = self.sharded_dim(weight)
        return found is not None and found[1] == self.matrix_dim

    def columns_are_sharded(self, weight: Any) -> bool:
        found = self.sharded_dim(weight)
        return found is not None and found[1] != self.matrix_dim

    def is_at_home(self) -> bool:
        """Whether the weight is placed as in the layer's forward, not sharded further by FSDP."""
        home = getattr(self.state("u"), "device_mesh", None)
        return home is not None and getattr(self.raw, "device_mesh", None) == home

    def group(self, weight: Any) -> Any:
        found = self.sharded_dim(weight)
        return None if found is None else weight.device_mesh.get_group(found[0])

    def local_operand(self, weight: Any) -> Tensor:
        """The part that is here, rows first, in the precision of the state."""
        part = self.operand(weight.detach().to_local())
        return part.to(compute_dtype(part))

    def local(self, name: str) -> Tensor:
        """The part of u or v that is here."""
        found: Any = self.state(name)
        part: Tensor = found.to_local()
        return part

    def put(self, weight: Any, u: Tensor, v: Tensor, sigma: Tensor) -> None:
        """Store u and v, whole, in the placements that match the weight's."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        dim = self.sharded_dim(weight)
        for name, whole, with_weight in (
            ("u", u, self.rows_are_sharded(weight)),
            ("v", v, self.columns_are_sharded(weight)),
        ):
            places = [Replicate() for _ in weight.placements]
            if with_weight and dim is not None:
                places[dim[0]] = Shard(0)  # type: ignore[call-overload]
            self.register_buffer(name, distribute_tensor(whole, weight.device_mesh, places, src_data_rank=None))
        self.register_buffer("sigma", sigma)
        self.keep_buffers()

    def saw(self, weight: Tensor) -> None:
        super().saw(weight)
        self.__dict__["_seen"] = (*self._seen[:-1], latest())

    # -- use ----------------------------------------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight, a DTensor placed as the weight."""
        if weight.is_meta:
            return weight
        if not is_dtensor(weight) or not self.is_own(weight):
            raise RuntimeError(
                f"{self.label()} is tensor-parallel, and is given a weight that is not its own DTensor; "
                "functional_call and ensembles are not supported for it"
            )
        current = self.current
        if current is None or not is_current(current, weight):
            refresh_distributed([self])
            current = self.snapshot(weight, vectors=True)
        return self._divided(weight, current.sigma, current.u, current.v)

    def _divided(self, weight: Any, sigma: Tensor, u: Any, v: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        local = weight.to_local(grad_placements=weight.placements)
        if u is None:  # a snapshot of a forward without gradients
            u, v = self.state("u"), self.state("v")
        group, options = self.group(weight), self.options
        result = _Divide.apply(
            local, sigma, u.to_local(), v.to_local(), group, self.matrix_dim, options.beta, options.cap
        )
        mesh, shape, stride = weight.device_mesh, weight.shape, weight.stride()
        return DTensor.from_local(result, mesh, weight.placements, run_check=False, shape=shape, stride=stride)


class _Divide(torch.autograd.Function):
    """``ops.normalize.normalize`` of the part of a matrix that is here."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, group: Any, rows: int, beta: float, cap: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, sigma, u, v)
        ctx.group, ctx.rows, ctx.beta, ctx.cap = group, rows, beta, cap
        return normalize_all([weight], [sigma], [beta], [cap])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, sigma, u, v = ctx.saved_tensors
        dtype = compute_dtype(grad, weight)
        sigma = sigma.to(dtype)
        active = sigma > ctx.beta if ctx.cap else sigma > 0
        g = grad.to(dtype)
        inner = torch.where(active, (g * (weight.to(dtype) / torch.where(active, sigma, 1.0))).sum(), 0.0)
        if ctx.group is not None:
            torch.distributed.all_reduce(inner, group=ctx.group)
        dsigma = torch.outer(u.to(dtype), v.to(dtype))
        dsigma = dsigma if ctx.rows == 0 else dsigma.T
        return ((g - inner * dsigma) / divisor(sigma, ctx.beta, ctx.cap)).to(grad.dtype), *(None,) * 7


# -- refresh -----------------------------------------------------------------------------------------------------------

Pair = tuple[DistributedSpectralNorm, Any]


def distributed(members: Iterable[nn.Module]) -> list[DistributedSpectralNorm]:
    """Those whose own weight is a DTensor of their own mesh, with memory: not a shard that FSDP has made of one."""
    found = [m for m in members if isinstance(m, DistributedSpectralNorm) and m.geometry is not None and not m.freezes]
    return [m for m in found if is_dtensor(m.raw) and not m.raw.is_meta and not m.sharded]


@torch._disable_dynamo
def refresh_distributed(
    members: Sequence[DistributedSpectralNorm], *, force: bool = False, n_power_iterations: int | None = None
) -> None:
    """Advance the states whose weight has moved on any process, or all if ``force``; on all processes together."""
    with LOCK, torch.inference_mode(False), torch.no_grad():
        by_group: dict[Any, list[Pair]] = {}
        for member in members:
            weight = member.raw
            by_group.setdefault(member.group(weight), []).append((member, weight))
        for group, pairs in by_group.items():
            _refresh_group(group, pairs, force, n_power_iterations)


def _refresh_group(group: Any, pairs: Sequence[Pair], force: bool, n: int | None) -> None:
    device = pairs[0][1].device
    marks = torch.tensor([_seen(member, weight) for member, weight in pairs], device=device)
    if group is not None:
        torch.distributed.all_reduce(marks, op=torch.distributed.ReduceOp.MAX, group=group)
    found = dict(zip(pairs, marks.tolist()))
    for pair in [p for p, mark in found.items() if mark == _LOADED]:
        found[pair] = _judged(group, *pair)
    for member, weight in [p for p, mark in found.items() if mark == _OTHER]:
        _restart(member, weight)
    moved = [p for p, mark in found.items() if mark == _MOVED or (force and mark == _SAME)]
    rounds: dict[int, list[Pair]] = {}
    for pair in moved:
        rounds.setdefault(n or pair[0].options.n_power_iterations, []).append(pair)
    for count, chosen in rounds.items():
        _iterate(group, chosen, count)


def _seen(member: DistributedSpectralNorm, weight: Any) -> int:
    """What this process sees of its part; the record becomes that of the weight as it is now."""
    part = member.operand(weight.detach().to_local())
    record, loaded = member.record, member.loaded
    if record is None or record.device != part.device:
        member.mark(weight.detach().to_local())
        return _OTHER if loaded is None else _LOADED
    member.saw(weight.detach().to_local())
    if _is_same(part, record):
        return _SAME
    member.__dict__["record"], far = renew_record(record, part)
    return _OTHER if far else _MOVED


def _is_same(part: Tensor, record: Tensor) -> bool:
    return torch.equal(record_of(part, hashed=True), record) if is_hashed(record) else same_content(part, record)


def _restart(member: DistributedSpectralNorm, weight: Any) -> None:
    """From the whole weight, gathered once: as one process starts."""
    whole = member.operand(weight.detach().full_tensor())
    dtype = compute_dtype(whole)
    u, v, sigma = (whole.new_zeros(size, dtype=dtype) for size in ((whole.shape[0],), (whole.shape[1],), ()))
    precision = member.options.product_precision
    operators.restart([whole], [u], [v], member.code)
    operators.advance([whole], [u], [v], [sigma], [], [], member.code, POWER_STEPS, precision)
    member.put(weight, u, v, sigma)
    member.__dict__["loaded"] = None


def _iterate(group: Any, pairs: Sequence[Pair], n: int) -> None:
    """``n`` power iterations of a matrix, from u: v = A^T u / |.|, w = A v, sigma = |w|, u = w / sigma."""
    parts = [member.local_operand(weight) for member, weight in pairs]
    us = [member.local("u").to(part.dtype) for (member, _), part in zip(pairs, parts)]
    vs: list[Tensor] = []
    norms: list[Tensor] = []
    rows = [member.rows_are_sharded(weight) for member, weight in pairs]
    columns = [member.columns_are_sharded(weight) for member, weight in pairs]
    for _ in range(n):
        vs, _ = _summed(group, [part.T @ u for part, u in zip(parts, us)], rows, columns)
        us, norms = _summed(group, [part @ v for part, v in zip(parts, vs)], columns, rows)
    for (member, _), u, v, sigma in zip(pairs, us, vs, norms):
        member.local("u").copy_(u)
        member.local("v").copy_(v)
        member.state("sigma").copy_(sigma)
        torch.autograd.graph.increment_version([member.state("u"), member.state("v")])


def _summed(
    group: Any, products: Sequence[Tensor], are_terms: Sequence[bool], are_parts: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """Unit vectors of products, and their norms, by one sum over all processes, in float64.

    ``are_terms``: the whole vector is the sum of the processes' products. ``are_parts``: each process has its part.
    """
    sent = [
        p.double() if term else p.double().square().sum()[None] if part else p.new_zeros(0, dtype=torch.float64)
        for p, term, part in zip(products, are_terms, are_parts)
    ]
    flat = torch.cat(sent)
    if group is not None:
        torch.distributed.all_reduce(flat, group=group)
    vectors, norms = [], []
    for p, received, term, part in zip(products, flat.split([s.numel() for s in sent]), are_terms, are_parts):
        whole = received if term else p.double()
        norm = received[0].sqrt() if part else torch.linalg.vector_norm(whole)
        vectors.append((whole / torch.where(norm > 0, norm, 1.0)).to(p.dtype))
        norms.append(norm.to(p.dtype))
    return vectors, norms


def _judged(group: Any, member: DistributedSpectralNorm, weight: Any) -> int:
    """What a state that was loaded is to the weight; as ``checkpoint.judge`` tells of a whole weight."""
    member.__dict__["loaded"] = None
    part = member.local_operand(weight)
    u, v = member.local("u").to(part.dtype), member.local("v").to(part.dtype)
    rows, columns = member.rows_are_sharded(weight), member.columns_are_sharded(weight)
    lengths = [_summed(group, [x], [False], [there])[1][0] for x, there in ((u, rows), (v, columns))]
    ((image,), (norm,)) = _summed(group, [part @ v], [columns], [rows])
    _, (away,) = _summed(group, [image - u], [False], [rows])
    sigma = member.state("sigma").to(part.dtype)
    shares = torch.stack([(norm - sigma).abs() / torch.where(sigma > 0, sigma, 1.0), away / 2])
    units = torch.stack([(length - 1).abs() for length in lengths])
    if not bool((units <= 5e-3).all() & (shares <= REPLACED).all()):  # False for NaN
        return _OTHER
    return _SAME if bool((shares <= _TIGHT * torch.finfo(part.dtype).eps).all()) else _MOVED


def together(members: Sequence[DistributedSpectralNorm], caller: str) -> None:
    """Wait for all processes that hold parts of these weights; raises where one does not come."""
    ranks: set[int] = set()
    for member in members:
        weight: Any = member.raw
        ranks |= set(weight.device_mesh.mesh.flatten().tolist())
    meet(sorted(ranks), caller)
