"""Weights of which every process holds a part: where the part lies, and the iteration that all processes make together.

FSDP2 and tensor parallelism have DTensors; FSDP1 with ``use_orig_params=True`` a stretch of the flattened weight.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.half_step import half_step
from ...ops.project_weights import State, as_matrix, iterate, repeated, scale
from ...ops.refresh import copy
from ...reference.power import normalized
from .projected import Projected

Box = tuple[slice, ...]


class Flat(NamedTuple):
    """Of a parameter in a flat one of FSDP1's: the whole weight's shape, and the stretch that is here."""

    shape: torch.Size
    start: int
    end: int
    group: Any


class Part(NamedTuple):
    """What this process holds of a sharded weight."""

    local: Tensor
    """The memory of the part, which is scaled."""
    box: Box
    """Where it lies in the whole weight; of a flat part in the flattened weight."""
    groups: tuple[Any, ...]
    """Process groups over which, one after the other, the parts add up to the weight."""
    way: Literal["rows", "blocks", "gathered"]
    """rows: whole rows, so that one sum gives A^T A v. blocks: two sums, of A v and of A^T u. gathered: the weight
    itself is summed, where it is smaller than these vectors."""


def flats_of(model: nn.Module) -> dict[int, Flat]:
    """By id, the parameters below ``model`` that FSDP1 has sharded."""
    found: dict[int, Flat] = {}
    for module, handle in _flat_handles(model):
        flat = handle.flat_param
        for parameter, shape, here in zip(flat._params or (), flat._shapes, flat._shard_param_infos):
            first, last = (here.intra_param_start_idx, here.intra_param_end_idx) if here.in_shard else (0, -1)
            found[id(parameter)] = Flat(shape, first, last + 1, module.process_group)
    return found


def _flat_handles(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """FSDP1's modules below ``model`` that shard parameters, and what each knows of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded by what was not imported
    for module in model.modules() if fsdp is not None else ():
        handle = getattr(module, "_handle", None) if isinstance(module, fsdp.FullyShardedDataParallel) else None  # type: ignore[union-attr]
        if handle is not None and handle.uses_sharded_strategy:
            yield module, handle


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back where a forward without backward has left the gathered ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None)
    if cls is not None:
        for module in model.modules():
            if isinstance(module, cls):
                module.reshard()
    for module, handle in _flat_handles(model):
        # The gathered memory can be kept although the parameters are sharded again: what is written would be missed.
        if hasattr(handle.flat_param, "_local_shard") and not handle.needs_unshard():
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(module, handle, True)


def is_distributed(weight: object) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def part_of(weight: Any, member: Projected, flats: dict[int, Flat]) -> Part | Tensor:
    """The part of the weight that is here; the weight itself where it is here as a whole."""
    flat = flats.get(id(weight))
    if flat is not None:
        return Part(weight.detach(), (slice(flat.start, flat.end),), (flat.group,), _way(member, "flat"))
    if not is_distributed(weight):
        return weight
    mesh, placements = weight.device_mesh, weight.placements
    if any(p.is_partial() for p in placements):
        raise RuntimeError(
            f"SpectralProjection: the weight of layer {member.name!r} is Partial on its mesh: {placements}"
        )
    sharded = [i for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1]
    local: Tensor = weight.detach().to_local()
    if not sharded:
        return local
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    box = tuple(slice(o, o + n) for n, o in zip(shape, offset))
    groups = tuple(mesh.get_group(i) for i in sharded)
    return Part(local, box, groups, _way(member, *(placements[i].dim % weight.ndim for i in sharded)))


def _way(member: Projected, *dims: int | str) -> Literal["rows", "blocks", "gathered"]:
    """How a weight that is sharded along these dimensions is iterated; the same on all ranks."""
    rows, shape = member.rows, member.shape
    columns = 1 - rows
    u, v = torch.Size(member.u_shape).numel(), torch.Size(member.v_shape).numel()
    by_rows = all(dim == rows for dim in dims)
    if shape.numel() <= (v if by_rows else u + v) or member.geometry.groups > 1:
        return "gathered"
    if by_rows:
        return "rows"
    splits = member.geometry.axes or len(shape) == 2  # else several dimensions make up the columns
    if dims == ("flat",):
        return "blocks" if splits or rows == 0 else "gathered"
    return "blocks" if splits and all(dim in (rows, columns) for dim in dims) else "gathered"


def whole_weight(member: Projected, part: Part) -> Tensor:
    """The weight, gathered from all processes."""
    return _summed([_padded(member, part)], part.groups)[0]


def _padded(member: Projected, part: Part) -> Tensor:
    """The whole weight with zeros where it is not here."""
    whole = part.local.new_zeros(member.shape)
    target = whole.view(-1) if len(part.box) < len(member.shape) else whole
    target[part.box] = part.local
    return whole


def map_whole(
    pairs: Sequence[tuple[Projected, Part]], function: Callable[[Projected, Tensor], Tensor], at_once: int = 8
) -> None:
    """Replace each weight by a function of the whole one: ``at_once`` weights are gathered together, and shared between
    the processes, each of which computes some. All of the same process groups."""
    groups = pairs[0][1].groups
    size = _number_of_processes(groups)
    place = 0
    for g in groups:
        place = place * torch.distributed.get_world_size(g) + torch.distributed.get_rank(g)
    for i in range(0, len(pairs), min(size, at_once)):
        some = pairs[i : i + min(size, at_once)]
        wholes = _summed([_padded(m, p) for m, p in some], groups)
        results = [
            function(m, w) if j == place else torch.zeros_like(w) for j, ((m, _), w) in enumerate(zip(some, wholes))
        ]
        for (m, part), whole in zip(some, _summed(results, groups)):
            source = whole.reshape(-1) if len(part.box) < len(m.shape) else whole
            part.local.copy_(source[part.box])


def _number_of_processes(groups: tuple[Any, ...]) -> int:
    return math.prod(torch.distributed.get_world_size(g) for g in groups)


def _summed(tensors: Sequence[Tensor], groups: tuple[Any, ...]) -> list[Tensor]:
    """Of every tensor the sum over all processes, in one collective per group."""
    if not tensors:
        return []
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
    for group in groups:
        torch.distributed.all_reduce(flat, group=group)
    return [x.view(t.shape) for x, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


class _Block(NamedTuple):
    """A part as the operator of some rows and columns of A."""

    operand: Tensor
    rows: slice
    columns: slice


def _block(member: Projected, part: Part) -> _Block:
    everything = slice(None)
    local, box = part.local, part.box
    if len(box) < len(member.shape):  # a stretch: the rows that it touches, with zeros where it is not
        (stretch,) = box
        width = member.shape[1:].numel()
        first, last = stretch.start // width, -(-stretch.stop // width)
        local = local.new_zeros(max(0, last - first), *member.shape[1:])
        local.view(-1)[stretch.start - first * width : stretch.stop - first * width] = part.local
        box = (slice(first, max(first, last)), everything)
    operand = as_matrix(local, member.rows).T if member.is_matrix else local
    columns = everything if part.way == "rows" else box[1 - member.rows]
    return _Block(operand, box[member.rows], columns)


def project_sharded(
    pairs: Sequence[tuple[Projected, Part]], n_iterations: int, tol: float | None, precision: str
) -> None:
    """``ops.project_weights`` of sharded weights, all of the same process groups.

    One collective per iteration serves all whose parts have whole rows. All processes call this together, and get the
    same bits of v and sigma.
    """
    groups = pairs[0][1].groups
    gathered = [(m, p) for m, p in pairs if p.way == "gathered"]
    shared = [(m, p) for m, p in pairs if p.way != "gathered"]
    waiting = [_padded(m, p) for m, p in gathered]  # they go with the first sum
    wholes: list[Tensor] = []

    def summed(tensors: list[Tensor]) -> list[Tensor]:
        results = _summed([*tensors, *waiting], groups)
        wholes.extend(results[len(tensors) :])
        waiting.clear()
        return results[: len(tensors)]

    if shared:
        members = [m for m, _ in shared]
        iteration = _Iteration(shared, precision, summed)
        state: State = [], [m.v for m in members], [m.sigma for m in members]
        _, vs, sigmas = repeated(iteration.step, state, n_iterations, tol)
        copy([m.v for m in members] + [m.sigma for m in members], [*vs, *sigmas])
    else:
        summed([])
    if gathered:
        members = [m for m, _ in gathered]
        old = [[getattr(m, name) for m in members] for name in ("u", "v", "sigma")]
        code = [c for m in members for c in m.code]
        found = iterate(wholes, (old[0], old[1], old[2]), [m.rows for m in members], code, n_iterations, tol, precision)
        copy([t for ts in old for t in ts], [t for ts in found for t in ts])
    scale(
        [p.local for _, p in pairs],
        [m.sigma for m, _ in pairs],
        [m.beta for m, _ in pairs],
        [m.cap for m, _ in pairs],
    )


class _Iteration:
    """Iterations of weights whose parts are rows or blocks."""

    def __init__(self, pairs: Sequence[tuple[Projected, Part]], precision: str, summed: Any) -> None:
        self._members = [m for m, _ in pairs]
        self._by_rows = [p.way == "rows" for _, p in pairs]
        self._blocks = [_block(m, p) for m, p in pairs]
        self._here = [i for i, b in enumerate(self._blocks) if b.operand.numel()]
        self._precision = precision
        self._summed = summed
        self._processes = _number_of_processes(pairs[0][1].groups)

    def step(self, state: State) -> State:
        """v <- A^T A v, normalised: of rows A^T (A v) is summed, of blocks first A v and then A^T u."""
        _, vs, sigmas = state
        # In units of the norm before, so that the square of a norm neither over- nor underflows.
        images = self._products([v[b.columns] for v, b in zip(vs, self._blocks)], second=False)
        unit = [torch.where(s > 0, s, 1.0) for s in sigmas]
        images = {i: image / unit[i] for i, image in images.items()}
        ours = [images.get(i) if rows else None for i, rows in enumerate(self._by_rows)]
        partial = self._products(ours, second=True)
        sent: list[Tensor] = []
        for i, (member, v) in enumerate(zip(self._members, vs)):
            image = images.get(i)
            if self._by_rows[i]:
                sent += [partial[i] if i in partial else torch.zeros_like(v), _lengths(image, unit[i])]
            else:
                sent += [self._spread(image, member.u_shape, self._blocks[i].rows, v), v.new_zeros(0)]
        received = self._summed(sent)
        sums = received[1::2]  # see _lengths; nothing of blocks
        lengths = [torch.where(q[0] > 0, q[0], 1.0).sqrt() if rows else q for q, rows in zip(sums, self._by_rows)]
        backs = received[::2]
        if not all(self._by_rows):
            backs = self._second_sums(backs, vs)
        found = [
            normalized((z / n if rows else z)[None], v[None], 1)
            for z, n, v, rows in zip(backs, lengths, vs, self._by_rows)
        ]
        norms = [norm[0, 0] for _, norm in found]
        # The sums of a weight that has grown or shrunk by 1e19 at once are infinite or zero. The sum of the lengths is
        # at most sqrt(processes) |A v|: a lower estimate, and the unit of the next iteration.
        norms = [
            torch.where((n > 0) & n.isfinite(), n, q[1] / math.sqrt(self._processes)) if rows else n
            for n, q, rows in zip(norms, sums, self._by_rows)
        ]
        return [], [v[0] for v, _ in found], norms

    def _second_sums(self, images: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
        """Of blocks A^T u, u = A v / |A v|; of rows what is given."""
        us = [
            None if rows else normalized(y[None], y[None], 1)[0][0][b.rows]
            for y, b, rows in zip(images, self._blocks, self._by_rows)
        ]
        partial = self._products(us, second=True)
        blocks = [i for i, rows in enumerate(self._by_rows) if not rows]
        sums = self._summed([self._spread(partial.get(i), vs[i].shape, self._blocks[i].columns, vs[i]) for i in blocks])
        results = list(images)
        for i, z in zip(blocks, sums):
            results[i] = z
        return results

    def _products(self, vectors: Sequence[Tensor | None], second: bool) -> dict[int, Tensor]:
        """Of the parts that are here, by number, the products with the vectors that are given."""
        chosen = [i for i in self._here if vectors[i] is not None]
        code = [c for i in chosen for c in self._members[i].code]
        operands = [self._blocks[i].operand for i in chosen]
        given = [x for x in (vectors[i] for i in chosen) if x is not None]
        products = half_step(operands, given, code, second, self._precision)
        return dict(zip(chosen, products))

    @staticmethod
    def _spread(part: Tensor | None, shape: Sequence[int], place: slice, like: Tensor) -> Tensor:
        whole = like.new_zeros(tuple(shape))
        if part is not None:
            whole[place] = part
        return whole


def _lengths(image: Tensor | None, unit: Tensor) -> Tensor:
    """Of a part of A v / unit: its squared norm, and the norm of that part of A v."""
    if image is None:
        return torch.stack((torch.zeros_like(unit), torch.zeros_like(unit)))
    _, norm = normalized(image[None], image[None], 1)
    return torch.stack((norm[0, 0].square(), norm[0, 0] * unit))


def by_groups(pairs: Sequence[tuple[Projected, Part]]) -> Iterator[list[tuple[Projected, Part]]]:
    """Those that share a device and process groups."""
    batches: dict[object, list[tuple[Projected, Part]]] = {}
    for member, part in pairs:
        ranks = tuple(tuple(torch.distributed.get_process_group_ranks(g)) for g in part.groups)
        batches.setdefault((part.local.device, ranks), []).append((member, part))
    yield from batches.values()
