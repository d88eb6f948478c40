"""The state of one normalised weight: u, v, sigma, the geometry that they are of, and the weight they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..layers.linear import chain, conv_operator
from ..ops.fingerprint import is_hashed, record_of, renew_record, same_content, update_record
from ..ops.records import is_on_host
from ..reference.geometry import Geometry
from ..reference.linear_map import compute_dtype
from .context import is_exporting, is_wrapped, within_functional_call
from .optimizer_steps import latest
from .options import Options
from .snapshot import Kept, Snapshot, identity_of, moment, version_of

# Attributes of a layer from which its geometry follows.
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
BUFFERS = ("u", "v", "sigma", "estimate", "top_group", "u_prev", "v_prev")


_INITIAL: dict[str, Any] = {
    "sharded": False,
    "loaded": None,
    "geometry": None,
    "layer_geometry": None,
    "code": (),
    "bound_code": (),
    "shape": None,
    "record": None,
    "current": None,
    "freezes": 0,
    "inherits": False,
    "_kept": None,
    "_settings": (),
    "_vectors": None,
    "_seen": (),
    "_home": None,
    "_own": (),
    "_own_buffers": (),
    "_frozen": None,
    "_warned": False,
}
"""Attributes of a state that has not begun."""


class State(nn.Module):
    """Base of the parametrization: what is stored, and for which weight.

    Buffers: ``v`` (right singular vector, input space), ``u`` (left, output space), ``sigma`` (scalar, of the raw
    weight); for grouped convolutions also ``top_group``, the group that attains sigma (u, v hold a unit pair per
    group); with ``gradient="full"`` also ``v_prev`` (``u_prev`` for a matrix), the start of the last iteration. With
    ``bound=True`` sigma is a certified bound, and ``estimate`` what the iteration found.
    They are kept in float32 at least, whatever the weight's dtype.

    ``record`` is a copy or a fingerprint of the weight that they belong to: while the weight has this content, nothing
    moves. It is no buffer: it is neither saved nor broadcast. None: nothing is known of the weight, the next use starts
    anew.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    estimate: Tensor

    sharded: bool  # by FSDP, which gathers the weight for the layer's own forward
    # A state was loaded beside a weight that cannot be read, with sigma or without: it is judged at the next use.
    loaded: bool | None
    geometry: Geometry | None  # what is iterated; None until the input size is known
    layer_geometry: Geometry | None  # the layer's own, before the exact reductions
    code: Sequence[int]
    bound_code: Sequence[int]  # all geometries that a certified sigma holds for, encoded
    shape: torch.Size | None  # of the weight
    record: Tensor | None
    current: Snapshot | None  # of the forward of the whole model that is under way
    freezes: int
    inherits: bool  # another process may have written weight and state, which are as good as loaded ones
    _kept: Kept | None
    _settings: tuple[object, ...]
    _vectors: tuple[int, int] | None  # the versions of u and v that an iteration has left
    _seen: tuple[object, ...]  # which tensor in which version the record is of: a hint, no proof
    _home: tuple[nn.Module, str] | None  # in a tuple: the module is no submodule of ours
    # In a tuple: no parameter of ours either, and no weak reference, which would forbid torch.utils.swap_tensors.
    _own: tuple[Tensor, ...]
    _own_buffers: tuple[Tensor | None, ...]  # to tell the buffers from those that functional_call puts there

    def __init__(
        self, options: Options, *, as_matrix: bool, matrix_dim: int, every_size: bool, hashed: bool = False
    ) -> None:
        super().__init__()
        self.__dict__.update(_INITIAL)  # nn.Module takes its time over every assignment
        self.options = options
        self.as_matrix = as_matrix
        self.matrix_dim = matrix_dim
        self.every_size = every_size  # sigma bounds the norm for every input size
        self.hashed = hashed  # keep a fingerprint of the weight in place of a copy
        self.sizes: set[tuple[int, ...]] = set()  # input sizes known to have no larger norm
        for name in ("u", "v", "sigma", *(["estimate"] if options.bound else [])):
            self.register_buffer(name, torch.empty(0))

    # -- the weight ---------------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, name: str) -> None:
        """Remember whose weight this is."""
        self._home = (module, name)
        self._own = (self.raw,)

    @property
    def module(self) -> nn.Module:
        assert self._home is not None
        return self._home[0]

    @property
    def siblings(self) -> parametrize.ParametrizationList:
        """The parametrizations of the weight, of which this is one."""
        assert self._home is not None
        return chain(*self._home)

    @property
    def raw(self) -> Tensor:
        """The raw weight."""
        found = self.siblings
        weight = found._parameters.get("original")  # without the attribute look-ups of nn.Module
        return found.original if weight is None else weight

    @property
    def is_first(self) -> bool:
        """Whether the raw weight itself is normalised, not what other parametrizations make of it."""
        return self.siblings._modules["0"] is self

    @property
    def is_plain(self) -> bool:
        """Whether the weight that is normalised is a registered parameter, which can be read at any time."""
        found = self.siblings
        if not torch.compiler.is_compiling() and "original" in found.__dict__:
            return False
        return found._parameters.get("original") is not None and found._modules["0"] is self

    @property
    def is_computed(self) -> bool:
        """Whether the raw weight is an attribute that something else computes before each forward."""
        found = self.siblings
        return found._parameters.get("original") is None or "original" in found.__dict__

    @property
    def is_cached(self) -> bool:
        """Whether torch.nn.utils.parametrize.cached() holds the weight, so that no use computes it."""
        assert self._home is not None
        module, name = self._home
        return bool(parametrize._cache_enabled) and (id(module), name) in parametrize._cache

    def incoming(self) -> Tensor:
        """The weight that this parametrization is given, as it would be now."""
        weight = self.raw
        for other in self.siblings:
            if other is self:
                break
            weight = other(weight)
        return weight

    def is_own(self, weight: Tensor) -> bool:
        """Whether ``weight`` comes from the module's own parameter, not from outside (functional_call, ensembles).

        Only the own weight moves the state. A parameter that was not seen before (loaded with assign=True, gathered by
        FSDP2, put there by an offloading hook) is the module's own from now on, except within functional_call.
        """
        found = self.siblings
        raw = found._parameters.get("original")
        exporting = is_exporting()
        compiling = torch.compiler.is_compiling() and not exporting
        if not (exporting or self._has_own_buffers(compiling)):  # what is written there is lost, the record is not
            return False
        if not compiling and "original" in found.__dict__:
            # A plain attribute, made from parameters of another name: a pruned weight, a view of FSDP1's.
            return not is_wrapped(found.__dict__["original"]) and not within_functional_call()
        if raw is None:
            return False
        if weight is not raw and found._modules["0"] is self:
            return False
        if self._own and raw is self._own[0]:
            return True
        if compiling or not isinstance(raw, nn.Parameter) or within_functional_call():
            return False
        if not exporting:  # there it is a fake
            self._own = (raw,)
        return True

    def _has_own_buffers(self, compiling: bool) -> bool:
        kept, there = self._own_buffers, self._buffers
        same = len(kept) == len(there)
        if same:
            for known, buffer in zip(kept, there.values()):
                if known is not buffer:
                    same = False
        if same:
            return True
        if compiling or within_functional_call():
            return False
        if [None if b is None else b.shape for b in kept] != [None if b is None else b.shape for b in there.values()]:
            self.record = None  # the state was started on others, which functional_call has taken away again
        self.keep_buffers()
        return True

    def keep_buffers(self) -> None:
        """Note that the buffers at hand are the module's own."""
        if not torch.compiler.is_compiling():
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_inference():  # loaded by assignment: nothing else could write to it
                    with torch.inference_mode(False):
                        self._buffers[name] = buffer.clone()
        self._own_buffers = tuple(self._buffers.values())

    def is_here(self, weight: Tensor) -> bool:
        """Whether a weight can be read: dense, in memory, and whole (not a shard, not offloaded, not on meta)."""
        if weight.is_meta or (weight.shape != self.shape and not self.is_resized(weight)):
            return False
        if torch.compiler.is_compiling():
            return True
        if is_traceable_wrapper_subclass(weight):
            return False
        return not weight.numel() or is_wrapped(weight) or weight.untyped_storage().size() > 0

    def is_resized(self, weight: Tensor) -> bool:
        """Whether a whole weight of another shape took the place of the own one, as in a head with more classes.

        Shards and offloaded weights are no plain parameters of as many dimensions.
        """
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or self.shape is None:
            return False
        if type(weight) is not nn.Parameter or weight.shape == self.shape or not self.is_first:
            return False
        return weight.ndim == len(self.shape) and weight.numel() > 0

    def operand(self, weight: Tensor) -> Tensor:
        """The weight as the operators take it: as it is, or as a matrix, rows first."""
        if not self.as_matrix or (weight.ndim == 2 and self.matrix_dim == 0):
            return weight
        return weight.movedim(self.matrix_dim, 0).flatten(1)

    # -- the record ---------------------------------------------------------------------------------------------------

    def has_moved(self, weight: Tensor) -> bool | None:
        """Whether the weight's content differs from the record's; None where only its device can tell."""
        if self.record is None:
            return True
        operand = self.operand(weight)
        if is_on_host(operand.device):
            return self.record.device != operand.device or not same_content(operand, self.record)
        return True if self.record.device != operand.device else None

    def inherit(self) -> None:
        """Expect a weight and a state that belong together, from another process."""
        self.inherits, self.record = True, None

    def is_suspect(self, weight: Tensor) -> bool:
        """Whether the host sees another weight: another tensor, or another version though no optimizer took a step."""
        *seen, steps = self._seen or (None, None)
        now = identity_of(weight)
        return tuple(seen) != now and (tuple(seen[1:]) != now[1:] or (steps is not None and steps is latest()))

    def mark(self, weight: Tensor) -> None:
        """Note that the state belongs to this weight."""
        operand = self.operand(weight)
        hashed, record = self.is_hashed_on(operand.device), self.record
        if record is None or record.device != operand.device or is_hashed(record) != hashed:
            self.__dict__["record"] = record_of(operand, hashed=hashed)
        else:
            self.__dict__["record"] = update_record(record, operand)
        self.saw(weight)

    def renew(self, weight: Tensor) -> bool | None:
        """``mark``, and whether the weight is so far from the one before that the vectors say little of it.

        None where the host cannot tell, and the record is left as it is.
        """
        record, operand = self.record, self.operand(weight)
        if record is None or not (is_on_host(operand.device) and operand.device == record.device):
            return None
        self.__dict__["record"], far = renew_record(record, operand)
        if is_hashed(record) != self.is_hashed_on(operand.device):  # it came from another device
            self.__dict__["record"] = record_of(operand, hashed=self.is_hashed_on(operand.device))
        self.saw(weight)
        return far

    def is_hashed_on(self, device: torch.device) -> bool:
        """Whether the record on this device is a fingerprint: always where only the device can compare."""
        return self.hashed or not is_on_host(device)

    def saw(self, weight: Tensor) -> None:
        """Note in which version a weight was when its device compared it."""
        # Whether the host will want to know who wrote it.
        asks = not weight.is_meta and (self.sharded or not is_on_host(weight.device))
        self.__dict__["_seen"] = (*identity_of(weight), latest() if asks else None)

    def note_vectors(self) -> bool:
        """Note in which version u and v are; returns whether it is another one than noted before: written by others."""
        versions = version_of(self.state("u")), version_of(self.state("v"))
        changed, self.__dict__["_vectors"] = self._vectors != versions, versions
        return changed

    @property
    def seen_at(self) -> object:
        """The mark of the optimizer's step after which the weight was compared last."""
        return self._seen[-1] if self._seen else None

    # -- geometry and buffers -----------------------------------------------------------------------------------------

    def geometry_for(self, input_size: Sequence[int] | None) -> Geometry:
        """The layer's geometry; ``input_size`` is that of a convolution."""
        if self.as_matrix or input_size is None:
            return Geometry()
        return conv_operator(self.module, self.raw.detach(), input_size).geometry

    def set_geometry(self, geometry: Geometry, weight: Tensor) -> None:
        self.layer_geometry = geometry
        self.geometry = geometry.reduced() if self.options.reduce else geometry
        self.code = self.geometry.encode()
        self.shape = weight.shape
        self._settings = self._settings_now()

    def settings_changed(self) -> bool:
        """Whether the layer's stride, padding and so on are others than those that the geometry was made from."""
        return not self.as_matrix and self._settings != self._settings_now()

    def _settings_now(self) -> tuple[object, ...]:
        return () if self.as_matrix else tuple([getattr(self.module, name, None) for name in _SETTINGS])

    def allocate(self, weight: Tensor) -> None:
        """Buffers for the geometry at hand, where those that are there do not fit in shape, dtype or device."""
        geometry, shape = self.known_geometry, self.operand(weight).shape
        dtype = compute_dtype(weight)
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "u": (geometry.out_shape(shape), dtype),
            "v": (geometry.in_shape(shape), dtype),
            "sigma": ((), dtype),
        }
        if self.options.bound:
            wanted["estimate"] = ((), dtype)
        if geometry.groups > 1:
            wanted["top_group"] = ((), torch.int64)
        if self.options.full:
            wanted[self.previous_name] = wanted["u" if self.as_matrix else "v"]
        for name, (size, kind) in wanted.items():
            there = self.buffer(name)
            if there is None or there.shape != size or there.dtype != kind or there.device != weight.device:
                self.register_buffer(name, torch.zeros(size, dtype=kind, device=weight.device))
        self.keep_buffers()

    @property
    def known_geometry(self) -> Geometry:
        if self.geometry is None:
            raise AttributeError("the input size is not known yet")  # which hasattr() of torch.jit.trace takes
        return self.geometry

    def buffer(self, name: str) -> Tensor | None:
        """A buffer that only some have."""
        return self._buffers.get(name)

    def state(self, name: str) -> Tensor:
        """``u``, ``v`` or ``sigma``, without the attribute look-ups of nn.Module."""
        found = self._buffers[name]
        assert found is not None
        return found

    @property
    def previous_name(self) -> str:
        return "u_prev" if self.as_matrix else "v_prev"

    @property
    def iterated_name(self) -> str:
        """The buffer of the norm that u and v attain."""
        return "estimate" if self.options.bound else "sigma"

    def snapshot(self, weight: Tensor, *, vectors: bool) -> Snapshot:
        """The state for one forward, in copies that nothing writes to, with the vectors if a backward may follow.

        The copies are made once for a state, and shared by the forwards that see it.
        """
        names = "sigma", "estimate", "u", "v", "top_group", self.previous_name
        buffers = [self._buffers.get(name) for name in names]
        now = moment(weight)
        stream = now[-2:]
        versions = [None if b is None else b._version for b in buffers], stream
        kept = self._kept
        if kept is None or kept.versions != versions or any(a is not b for a, b in zip(kept.buffers, buffers)):
            kept = None
        if kept is None or (vectors and kept.snapshot.u is None):
            needed = (True, True, vectors, vectors, vectors, True)
            copies = [b.clone() if b is not None and n else None for b, n in zip(buffers, needed)]
            sigma, estimate, u, v, group, previous = copies
            assert sigma is not None
            kept = Kept(Snapshot(sigma, estimate, u, v, group, previous, now, []), buffers, versions)
            self.__dict__["_kept"] = kept
        return kept.snapshot._replace(moment=now, ready=[])
