"""Parametrizations that advance together, and the advance itself."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.library import has_kernels, kernels_of, stream_of
from ..ops.normalize import normalize_all
from ..ops.power_step import power_step
from ..ops.prepared_step import PreparedStep, prepare

if TYPE_CHECKING:
    from .parametrization import SpectralNorm


class Group:
    """Parametrizations that are refreshed together, in one operator call. Copies of a model get groups of their own.

    Members are held weakly, and count only as long as they sit on a weight: a layer that has been replaced in the
    model is neither kept alive nor iterated.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[SpectralNorm]] = []
        self._ready: _Ready = weakref.WeakKeyDictionary()

    def add(self, member: SpectralNorm) -> None:
        self._members.append(weakref.ref(member))

    def members(self) -> list[SpectralNorm]:
        found = [m for m in (reference() for reference in self._members) if m is not None and m.is_attached()]
        if len(found) < len(self._members):
            self._members = [weakref.ref(m) for m in found]
        return found

    def refresh(self) -> None:
        """Advance every member whose raw weight has moved."""
        stale = [m for m in self.members() if m.is_stale()]
        if stale:
            advance(stale)

    def take_normalized(self, member: SpectralNorm) -> Tensor | None:
        """The normalised weight of a member, outside autograd, where kernels compute all members' in one launch.

        What is computed is handed out once, so a forward of the model costs one launch and nothing is kept after it.
        """
        device = member.raw.device
        # A graph under capture has to contain the launch, and nothing that it makes may be used outside it.
        if not has_kernels(device) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        state, value = self._ready.pop(member, (None, None))
        if value is None or state != _state(member):
            with torch.inference_mode(False), torch.no_grad():
                ready = _normalized([m for m in self.members() if m.can_be_ready_with(member)])
            _, value = ready.pop(member)  # before other threads can take it
            self._ready = ready
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group()  # each copied member joins the new group itself; deepcopy's memo makes it one for all


_Ready: TypeAlias = "weakref.WeakKeyDictionary[SpectralNorm, tuple[object, Tensor]]"


def _normalized(members: list[SpectralNorm]) -> _Ready:
    options = [m.options for m in members]
    values = normalize_all(
        [m.operand(m.raw) for m in members],
        [m.sigma for m in members],
        [o.beta for o in options],
        [o.cap for o in options],
    )
    return weakref.WeakKeyDictionary({m: (_state(m), value) for m, value in zip(members, values)})


def _state(member: SpectralNorm) -> object:
    """Changes with everything that a normalised weight depends on, and with the stream that it is computed on."""
    weight, sigma = member.raw, member.state("sigma")
    of_weight = _address(weight), _version(weight), _placement(weight)
    return of_weight, _version(sigma), sigma.data_ptr(), stream_of(weight.device)


class WeightMark:
    """Which weight, in which state, u, v and sigma belong to."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weakref.ref(weight)
        self._version = _version(weight)
        self._placement = _placement(weight)
        self._address = _address(weight)

    def fits(self, weight: Tensor) -> bool:
        """Whether ``weight`` is that tensor, unwritten. A move to another dtype, device or layout is no change."""
        if self._weight() is not weight or self._version != _version(weight):
            return False
        return self._placement != _placement(weight) or self._address == _address(weight)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _placement(weight: Tensor) -> tuple[object, ...]:
    return weight.dtype, weight.device, weight.stride()


def _address(weight: Tensor) -> int:
    """Tells a weight whose ``.data`` was replaced; 0 where there is no memory to have an address."""
    return weight.data_ptr() if type(weight) is nn.Parameter and not weight.is_meta else 0


def advance(members: Iterable[SpectralNorm], n_power_iterations: int | None = None) -> None:
    """Advance u, v, sigma of these parametrizations, all that share a device and a number of iterations in one call."""
    batches: dict[tuple[torch.device, int, bool, str], list[SpectralNorm]] = {}
    for m in members:
        n = n_power_iterations or m.options.n_power_iterations
        batches.setdefault((m.state("u").device, n, m.options.full, m.options.products()), []).append(m)
    compiling = torch.compiler.is_compiling()
    with torch.no_grad():
        for (_, n, full, precision), batch in batches.items():
            step = None if full or compiling else _prepared(batch, precision)
            if step is None:
                _advance_copies(batch, n, full, precision)
            else:
                step.run(n)
                states = [
                    t for m in batch for t in (m.state("u"), m.state("v"), m.state("sigma"), m.buffer("top_group"))
                ]
                torch.autograd.graph.increment_version([t for t in states if t is not None])
            for m in batch:
                if m.options.bound:
                    m.certify(m.sigma)
            if not compiling:
                for m in batch:
                    m.mark_current()


def _advance_copies(batch: list[SpectralNorm], n: int, full: bool, precision: str) -> None:
    """By the operator, whose results are new tensors."""
    weights = [m.operand(m.raw) for m in batch]
    us, vs = [m.u for m in batch], [m.v for m in batch]
    code = [c for m in batch for c in m.code]
    if full and n > 1:
        us, vs, _, _ = power_step(weights, us, vs, code, n - 1, precision)
    if full:
        _copy([m.previous for m in batch], [u if m.as_matrix else v for m, u, v in zip(batch, us, vs)])
    us, vs, sigmas, groups = power_step(weights, us, vs, code, 1 if full else n, precision)
    _copy([b for m in batch for b in (m.u, m.v, m.sigma)], [t for ts in zip(us, vs, sigmas) for t in ts])
    top = [(m.buffer("top_group"), group) for m, group in zip(batch, groups)]
    _copy([b for b, _ in top if b is not None], [group for b, group in top if b is not None])


# Of each first member of a batch: its batches, and what was found for them. Kept here, for members are copied, pickled.
_Found: TypeAlias = "OrderedDict[tuple[int, ...], tuple[object, PreparedStep | None]]"
_steps: weakref.WeakKeyDictionary[SpectralNorm, _Found] = weakref.WeakKeyDictionary()
_MOST_BATCHES = 4  # the whole model, and parts that are trained in turn


def _prepared(batch: list[SpectralNorm], precision: str) -> PreparedStep | None:
    """In place, by kernels, if nothing stands between a weight and its memory: found once for the same tensors."""
    if kernels_of(batch[0].state("u").device) is None:
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():  # these want operators
        return None
    found = _steps.setdefault(batch[0], OrderedDict())
    members, where = tuple(map(id, batch)), (precision, [_where(m) for m in batch])
    known, step = found.get(members, (None, None))
    if known != where:
        step = _prepare(batch, precision)
        found[members] = where, step
    found.move_to_end(members)
    while len(found) > _MOST_BATCHES:
        found.popitem(last=False)
    return step


def _prepare(batch: list[SpectralNorm], precision: str) -> PreparedStep | None:
    weights = [m.operand(m.raw) for m in batch]
    if not all(type(m.raw) is nn.Parameter and w.data_ptr() == m.raw.data_ptr() for m, w in zip(batch, weights)):
        return None
    us, vs, sigmas = ([m.state(name) for m in batch] for name in ("u", "v", "sigma"))
    code = [c for m in batch for c in m.code]
    return prepare(weights, us, vs, sigmas, [m.buffer("top_group") for m in batch], code, precision)


def _where(member: SpectralNorm) -> tuple[object, ...]:
    """All that a prepared step takes for given: where weight and state lie, and how."""
    raw, group = member.raw, member.buffer("top_group")
    u, v, sigma = member.state("u"), member.state("v"), member.state("sigma")
    places = raw.data_ptr(), u.data_ptr(), v.data_ptr(), sigma.data_ptr(), group.data_ptr() if group is not None else 0
    kinds = raw.dtype, u.dtype, v.dtype, sigma.dtype, None if group is None else group.dtype
    return places, kinds, raw.shape, raw.stride(), u.shape, u.stride(), v.shape, v.stride(), type(raw), member.geometry


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies into buffers, all in a few launches."""
    if targets:
        torch._foreach_copy_(targets, sources)
        if _lists_keep_versions():
            torch.autograd.graph.increment_version(targets)


def _lists_keep_versions() -> bool:
    """Whether writes to lists of tensors (``_foreach_...``) leave ``_version``: they do under a TorchDispatchMode."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _bump_versions_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Some optimizers write their parameters without bumping ``_version``, the fused ones always: do it for them."""
    lists = _lists_keep_versions()  # foreach is the default on GPUs
    for group in optimizer.param_groups:
        if lists or group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_bump_versions_after_step)
