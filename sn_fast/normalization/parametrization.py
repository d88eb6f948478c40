"""The parametrization of one weight, and the rule of its state: sigma belongs to the weight in use.

The buffers u, v and sigma move once after the content of the raw weight has changed, before the weight is used again,
and never otherwise: all forwards, recomputations and backwards of one weight see one sigma, in train and in eval.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import users_stacklevel
from ..layers.linear import whole_window_size
from ..ops.fingerprint import is_hashed, record_of, same_content
from ..ops.normalize import normalize, normalize_all
from ..reference.normalize import normalize as normalize_reference
from ..reference.power import sigma_through_last_iteration
from . import checkpoint
from .certify import certify_operand
from .context import is_exporting, within_functional_call
from .foreign import normalize_foreign
from .recompute import note_made
from .refresh import LOCK, advance, readable, refresh_model, restart, settle_loaded, snapshots, with_ready_weights
from .snapshot import Snapshot, is_current
from .state import State
from .under_way import gathered_beside


class SpectralNorm(State):
    """Parametrization W -> W / max(1, sigma / beta), or beta * W / sigma, of one weight."""

    is_replica = False
    path = ""
    """Of the layer in the model that ``apply_spectral_norm`` was given."""
    _frozen: Tensor | None
    _warned: bool

    # -- start --------------------------------------------------------------------------------------------------------

    def start(self, input_size: tuple[int, ...] | None) -> None:
        """See ``start_together``."""
        start_together([(self, input_size)])

    # -- use ----------------------------------------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight; refreshes the state first if this weight's content has changed."""
        if self.geometry is None:  # the input size is not known before the first forward
            return weight
        if self.is_replica:
            return self.normalize(weight, self._moved_to(weight.device))
        if not self.is_own(weight):
            return self._shaped(normalize_foreign(self, self.operand(weight)), weight)
        if torch.jit.is_tracing() or is_exporting():
            return self._traced(weight)
        if self._frozen is not None:
            return self._frozen
        current = self.current
        if current is None or not is_current(current, weight) or (current.u is None and torch.is_grad_enabled()):
            if not torch.compiler.is_compiling() and not self.is_here(weight) and not weight.is_meta:
                raise RuntimeError(
                    f"{type(self.module).__name__}: the weight that spectral normalisation is given is a "
                    f"{type(weight).__name__} of shape {tuple(weight.shape)}, not the whole weight of shape "
                    f"{tuple(self.shape or ())}; sharded weights are gathered by their own module's forward"
                )
            current = self._refreshed(weight)
        return self.normalize(weight, current)

    def _refreshed(self, weight: Tensor) -> Snapshot:
        """The state for this weight; layers that are gathered with it are refreshed in the same call."""
        beside = gathered_beside(self) if self.sharded and not torch.compiler.is_compiling() else []
        current, *others = snapshots([(self, weight), *beside])
        for (member, _), state in zip(beside, others, strict=True):
            member.__dict__["current"] = state
        return current

    def normalize(self, weight: Tensor, state: Snapshot) -> Tensor:
        """The normalised weight for this state."""
        operand, options = self.operand(weight), self.options
        beta, cap = options.beta, options.cap
        if options.full:
            assert state.previous is not None
            sigma = sigma_through_last_iteration(operand, state.previous, self.known_geometry)
            result = normalize_reference(operand, sigma, beta, cap)
        elif state.u is None or state.v is None:
            found = _popped(state.ready)
            result = normalize_all([operand], [state.sigma], [beta], [cap])[0] if found is None else found
        else:
            u = state.u
            if state.estimate is not None:  # the gradient of the bound, as far as it follows the norm in proportion
                u = u * torch.where(state.estimate > 0, state.sigma / state.estimate, 1.0)
            precision, ready = options.product_precision, _popped(state.ready)
            result = normalize(operand, state.sigma, u, state.v, state.group, self.code, beta, cap, precision, ready)
        shaped = self._shaped(result, weight)
        if self.sharded and not options.full and state.u is not None and not torch.compiler.is_compiling():
            note_made(shaped, lambda: self._again(weight, state.sigma))
        return shaped

    def _again(self, weight: Tensor, sigma: Tensor) -> Tensor:
        """What ``normalize`` has made, outside autograd."""
        (result,) = normalize_all([self.operand(weight)], [sigma], [self.options.beta], [self.options.cap])
        return self._shaped(result, weight)

    def _shaped(self, result: Tensor, weight: Tensor) -> Tensor:
        """A normalised operand in the form of its weight."""
        if not self.as_matrix or (weight.ndim == 2 and self.matrix_dim == 0):
            return result
        dims = [weight.shape[self.matrix_dim], *weight.shape[: self.matrix_dim], *weight.shape[self.matrix_dim + 1 :]]
        return result.reshape(dims).movedim(0, self.matrix_dim)

    def _traced(self, weight: Tensor) -> Tensor:
        """In operations that torch.jit.trace and torch.export can save; sigma is the constant that it is now."""
        own = self._own[0] if self.is_plain and self._own else None
        if own is not None and self.record is not None:
            with untraced(), _disable_current_modes(), torch.no_grad():
                moved = self.has_moved(own)
            if moved:
                raise RuntimeError(
                    "spectral_norm: the weights have changed since sigma was computed, and an exported or traced model "
                    "cannot compute it; run one forward, or call update_spectral_norm(model), before the export"
                )
        operand, options = self.operand(weight), self.options
        return self._shaped(normalize_reference(operand, self.sigma, options.beta, options.cap), weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the weight sets the raw weight.

        Raises:
            ValueError: by ``torch.func.functional_call``, which would put the normalised weight back in its place.
        """
        if self._home is not None and not torch.compiler.is_compiling() and within_functional_call():
            name = self._home[1]
            raise ValueError(
                f"functional_call gives {self.label()} a {name!r}, which is made from its raw weight; give the raw "
                f"one, under the name 'parametrizations.{name}.original' that named_parameters() has for it"
            )
        return weight

    # -- frozen -------------------------------------------------------------------------------------------------------

    def thaw(self) -> None:
        self.freezes -= 1
        if not self.freezes:
            self._frozen = None

    # -- input sizes --------------------------------------------------------------------------------------------------

    def observe(self, size: tuple[int, ...]) -> None:
        """Called with the spatial size of each forward's input: start at the first, warn at one not normalised for."""
        if self.geometry is None:
            tracing = torch.jit.is_tracing()
            if tracing or torch.compiler.is_compiling():
                raise RuntimeError(
                    "spectral_norm: the input size of a convolution is not known yet inside "
                    f"torch.{'jit.trace' if tracing else 'compile'}; "
                    "give input_size=..., use apply_spectral_norm(model, example_input), or run one eager forward first"
                )
            with LOCK:
                if self.geometry is None:  # another thread's forward may have been first
                    self.start(size)
                if self.freezes:
                    freezes, self.freezes = self.freezes, 0
                    freeze([self])
                    self.freezes = freezes
        elif not (self._warned or torch.compiler.is_compiling() or self.covers(size)):
            self._warned = True
            assert self.layer_geometry is not None
            warnings.warn(
                f"sn_fast: {self.label()} was normalised for inputs of size {self.layer_geometry.input_size} but is "
                f"used at {size}, where its norm can be larger; apply spectral_norm again with input_size= the largest "
                "size",
                stacklevel=users_stacklevel(),
            )

    def label(self) -> str:
        kind = parametrize.type_before_parametrizations(self.module).__name__
        return f"layer {self.path!r} ({kind})" if self.path else kind

    def covers(self, size: tuple[int, ...]) -> bool:
        """Whether the norm at this input size is known to be at most the one in use.

        With zero padding a smaller input is a restriction of a larger one, so the norm grows with the size. An axis
        whose windows do not overlap has the same norm at every size.
        """
        geometry = self.layer_geometry
        assert geometry is not None
        if not geometry.axes or self.every_size or size in self.sizes:
            return True
        whole = whole_window_size(self.module)
        return all(
            (w is not None and axis == axis.collapsed()) or (want <= have if geometry.mode == "zeros" else want == have)
            for axis, w, have, want in zip(self.known_geometry.axes, whole, geometry.input_size, size, strict=True)
        )

    # -- copying, moving, saving, loading -----------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        refresh_model([self])  # a copy carries no pending change
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo.update({id(frozen): frozen for frozen in (self.options, self.geometry, self.layer_geometry)})
        transient = {"freezes": 0, "_frozen": None, "current": None, "_kept": None}
        own = {**self.__dict__, **transient}
        empty = {k: copy.copy(v) for k, v in own.items() if isinstance(v, dict) and not v}  # of hooks: most of the time
        with torch.inference_mode(False):  # a state that was made there could not be written
            twin.__dict__.update(copy.deepcopy({k: v for k, v in own.items() if k not in empty}, memo), **empty)
        return twin

    def _replicate_for_data_parallel(self) -> SpectralNorm:
        """A replica uses the state of the module, refreshed before; torch copied the buffers earlier than that."""
        replica = super()._replicate_for_data_parallel()
        pairs = readable([self])
        if pairs:
            replica.__dict__["current"] = snapshots(pairs)[0]
            replica.__dict__["is_replica"] = True
        return replica

    def _moved_to(self, device: torch.device) -> Snapshot:
        assert self.current is not None
        return self.current.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralNorm:
        with torch.inference_mode(False), torch.no_grad():
            record, own = self.record, self._own[0] if self._own else None
            before: Tensor | None = None  # the operand that the state belongs to
            away = own is not None and not own.is_meta and not self.is_here(own)  # a shard: no record can follow it
            known = away and (record is not None or self.loaded is not None)
            sigma = self.state("sigma")
            if away:
                pass
            elif record is not None and not is_hashed(record):
                before = record
            elif record is not None and own is not None:
                refresh_model([self])
                before = self.operand(own.detach())
            # What happens to the weight happens to its copy: a move is no change, and a pending one stays pending.
            after: Tensor | None = None if before is None else fn(before)
            if before is None or after is None or not _is_move(before, after):
                self.record = self.loaded = None  # to_empty, say: memory holds anything, also what was there before
            else:
                self.record = record_of(after, hashed=True) if self.is_hashed_on(after.device) else after
            for name, buffer in self._buffers.items():
                if buffer is not None:
                    moved = fn(buffer.flatten()).view(buffer.shape)  # flat: a memory format is for the weight alone
                    # State stays float32 under .half() and .bfloat16().
                    self._buffers[name] = buffer.to(moved.device) if _is_half(moved) else moved
            if known and _is_move(sigma, self.state("sigma")):
                self.loaded = True  # judged by the weight when that is gathered
            if self.record is not None and (self.record.is_meta or self.u.is_meta):
                self.record = None  # there is nothing to compare any more
            elif self.options.bound and self.record is not None and _is_rounded(before, after):
                assert after is not None
                certify_operand(self, after)  # a bound of the weight before says nothing certain of the rounded one
            self.keep_buffers()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        refresh_model([self])  # what is saved belongs to the weight that is saved
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loading is no change of weight; the stored u, v, sigma are taken as they are if they belong to the weight."""
        stored = checkpoint.translate(self, state_dict, prefix, load=args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._buffers.update({k: b.float() for k, b in self._buffers.items() if b is not None and _is_half(b)})
        self.keep_buffers()
        if self.geometry is None:
            return
        # The raw weight is loaded before its parametrization.
        with torch.no_grad():
            weight = self.incoming()
        if not self.is_computed:
            self._own = (self.raw,)
        if not self.is_here(weight):
            self.record = None
            known = {checkpoint.Stored.STATE: True, checkpoint.Stored.VECTORS: False}
            self.loaded = known.get(stored)
        elif stored is checkpoint.Stored.NOTHING:
            if self.has_moved(weight) is not False:
                restart([(self, weight)])
        elif stored is checkpoint.Stored.VECTORS and checkpoint.belongs(self, weight, with_sigma=False):
            advance([(self, weight)])
        elif stored is checkpoint.Stored.STATE:
            with torch.no_grad():
                settle_loaded(self, weight)
        else:
            restart([(self, weight)])

    def __prepare_scriptable__(self) -> SpectralNorm:
        raise RuntimeError(
            f"torch.jit.script cannot compile {self.label()}, which is normalised before each use; use "
            "torch.jit.trace, torch.export or torch.compile, or script a copy after sn_fast.remove_spectral_norm(copy)"
        )

    def extra_repr(self) -> str:
        size = "unknown" if self.geometry is None else f"{tuple(self.v.shape)} -> {tuple(self.u.shape)}"
        return f"{size}, beta={self.options.beta:g}, mode={self.options.mode!r}, gradient={self.options.gradient!r}"


def start_together(members: Sequence[tuple[SpectralNorm, tuple[int, ...] | None]]) -> None:
    """Fix the geometries, for these input sizes, and find u, v, sigma of the current weights, in one call.

    Of a weight from outside (functional_call) the geometry alone is kept: the own one starts at its first use.
    """
    with LOCK, torch.no_grad():
        own = []
        for member, input_size in members:
            weight = member.incoming()
            member.set_geometry(member.geometry_for(input_size), weight)
            if member.is_own(weight):
                own.append((member, weight))
            else:
                with torch._C._DisableFuncTorch():
                    member.allocate(weight)
        restart(own)


def spectral_norms(model: nn.Module) -> list[SpectralNorm]:
    """All below ``model``, each once."""
    if isinstance(model, SpectralNorm):
        return [model]
    found: dict[SpectralNorm, None] = {}
    seen: set[nn.Module] = set()
    waiting: list[nn.Module] = [model]
    while waiting:  # by hand: nn.Module's own walk takes longer than the refresh
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        inner = []
        for child in module._modules.values():
            if child is None:
                continue
            if isinstance(child, SpectralNorm):
                found[child] = None
            elif child._modules:
                inner.append(child)
        waiting += reversed(inner)
    return list(found)


def freeze(members: Sequence[SpectralNorm]) -> None:
    """Keep the normalised weights, all computed in one call, and the states, until as many calls of ``thaw``."""
    # What a hook computes before each forward (a pruned weight) cannot be kept from here.
    pairs = readable([m for m in members if m._home and not m.is_computed])
    states = with_ready_weights(pairs, snapshots(pairs))
    given = {member: (weight, state) for (member, weight), state in zip(pairs, states)}
    frozen = {member: member.normalize(*given[member]).detach() for member in members if member in given}
    for member in members:
        member._frozen = frozen.get(member, member._frozen)
        member.freezes += 1


def refresh(model: nn.Module) -> None:
    """Advance every normalised layer below ``model`` whose raw weight has moved."""
    refresh_model(spectral_norms(model))


@contextmanager
def untraced() -> Iterator[None]:
    """Within this context torch.jit.trace records nothing."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _popped(ready: list[Tensor]) -> Tensor | None:
    if torch.compiler.is_compiling():  # it makes none ready, and torch 2.7 compiles no such exception
        return None
    try:
        return ready.pop()
    except IndexError:  # another thread was first
        return None


def _is_move(before: Tensor, after: Tensor) -> bool:
    """Whether one tensor is the other on another device or in another dtype."""
    if before.is_meta or after.is_meta:
        return False
    return same_content(after.cpu(), before.to(after.dtype).cpu())


def _is_rounded(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether a conversion of dtype may have changed values."""
    if before is None or after is None:
        return False
    return torch.promote_types(before.dtype, after.dtype) != after.dtype


def _is_half(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < 4
