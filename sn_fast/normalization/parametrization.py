"""The parametrization of one weight, and the rule of its state: sigma belongs to the weight in use.

The buffers u, v and sigma move once after the raw weight has moved, before the weight is used again, and never
otherwise: all forwards, recomputations and backwards of one weight see one sigma, in train and in eval.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import LayerOperator, chain, conv_operator, whole_window_size
from ..norms.estimate import start_vectors
from ..norms.layer_bound import certified_sigma
from ..ops.normalize import normalize
from ..reference.geometry import Geometry
from ..reference.normalize import normalize as normalize_reference
from ..reference.power import sigma_through_last_iteration
from . import checkpoint
from .group import Group, WeightMark, advance
from .options import Options

START_ITERATIONS = 15
START_POWER_ITERATIONS = 2  # the first repeats what Lanczos found, the second is one beyond it


class SpectralNorm(nn.Module):
    """Parametrization W -> W / max(1, sigma / beta), or beta * W / sigma, of one weight.

    Buffers: ``v`` (right singular vector, input space), ``u`` (left, output space), ``sigma`` (scalar, of the raw
    weight); for grouped convolutions also ``top_group``, the group that attains sigma (u, v hold a unit pair per
    group); with ``gradient="full"`` also ``v_prev`` (``u_prev`` for a matrix), the start of the last iteration. With
    ``bound=True`` sigma is a certified bound, and ``estimate`` what the iteration found.
    They are kept in float32 at least, whatever the weight's dtype.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    estimate: Tensor

    def __init__(self, group: Group, options: Options, *, as_matrix: bool, matrix_dim: int, every_size: bool) -> None:
        super().__init__()
        self.options = options
        self.as_matrix = as_matrix
        self.matrix_dim = matrix_dim
        self.every_size = every_size  # sigma bounds the norm for every input size
        self.geometry: Geometry | None = None  # what is iterated; None until the input size is known
        self.layer_geometry: Geometry | None = None  # the layer's own, before the exact reductions
        self.code: list[int] = []
        self.sizes: set[tuple[int, ...]] = set()  # input sizes known to have no larger norm
        self._group = group
        self._home: tuple[nn.Module, str] | None = None  # in a tuple: the module is no submodule of ours
        self._mark: WeightMark | None = None
        self._freezes = 0
        self._frozen: Tensor | None = None
        self._warned = False
        for name in ("u", "v", "sigma", *(["estimate"] if options.bound else [])):
            self.register_buffer(name, torch.empty(0))

    # -- the weight ---------------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, name: str) -> None:
        """Remember whose weight this is, and join the group."""
        self._home = (module, name)
        self._group.add(self)

    @property
    def module(self) -> nn.Module:
        assert self._home is not None
        return self._home[0]

    def is_attached(self) -> bool:
        """Whether this still is a parametrization of its module's weight."""
        if self._home is None:
            return False
        try:
            return any(p is self for p in chain(*self._home)._modules.values())
        except KeyError:
            return False

    @property
    def raw(self) -> Tensor:
        """The raw weight."""
        assert self._home is not None
        found = chain(*self._home)
        weight = found._parameters.get("original")  # without the attribute look-ups of nn.Module
        return found.original if weight is None else weight

    def operand(self, weight: Tensor) -> Tensor:
        """The weight as the operators take it: as it is, or as a matrix, rows first."""
        if not self.as_matrix or (weight.ndim == 2 and self.matrix_dim == 0):
            return weight
        return weight.movedim(self.matrix_dim, 0).flatten(1)

    def start(self, input_size: Sequence[int] | None) -> None:
        """Fix the geometry, and find u, v, sigma of the current weight."""
        with torch.inference_mode(False), torch.no_grad():  # the buffers must not be inference tensors
            self.set_geometry(self.geometry_for(input_size))
            self.u, self.v = start_vectors(self._operator(), START_ITERATIONS)
            self.sigma = self.u.new_ones(())
            if self.options.bound:
                self.estimate = self.sigma.clone()
            if self.options.full:
                self.register_buffer(self.previous_name, torch.empty_like(self.u if self.as_matrix else self.v))
            advance([self], START_POWER_ITERATIONS)

    def restart(self) -> None:
        """Find u, v, sigma anew, for a weight that has nothing to do with the one they belong to."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer, vector in zip((self.u, self.v), start_vectors(self._operator(), START_ITERATIONS)):
                buffer.copy_(vector)
            advance([self], START_POWER_ITERATIONS)

    def geometry_for(self, input_size: Sequence[int] | None) -> Geometry:
        """The layer's geometry; ``input_size`` is that of a convolution."""
        if self.as_matrix or input_size is None:
            return Geometry()
        return conv_operator(self.module, self.raw.detach(), input_size).geometry

    def set_geometry(self, geometry: Geometry) -> None:
        self.layer_geometry = geometry
        self.geometry = geometry.reduced() if self.options.reduce else geometry
        self.code = self.geometry.encode()
        if geometry.groups > 1 and self.buffer("top_group") is None:
            self.register_buffer("top_group", torch.zeros((), dtype=torch.int64, device=self.raw.device))

    def _operator(self) -> LayerOperator:
        return LayerOperator(self.operand(self.raw.detach()), self.known_geometry)

    @property
    def known_geometry(self) -> Geometry:
        assert self.geometry is not None
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
    def previous(self) -> Tensor:
        """Where the last iteration started (``gradient="full"``)."""
        start = self.buffer(self.previous_name)
        assert start is not None
        return start

    # -- state --------------------------------------------------------------------------------------------------------

    def is_stale(self) -> bool:
        """Whether the raw weight has moved since sigma was computed."""
        if self.geometry is None or self._freezes:
            return False
        return self._mark is None or not self._mark.fits(self.raw)

    def certify(self, estimate: Tensor) -> None:
        """Keep the norm that iteration found as ``estimate``, and have a certified bound as sigma."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "spectral_norm(bound=True) computes its certificate in eager code: call update_spectral_norm(model) "
                "outside torch.compile"
            )
        geometry = self.layer_geometry
        assert geometry is not None
        geometries = {geometry}
        if geometry.mode != "zeros" and not self.every_size:  # else the largest size has the largest norm
            geometries |= {self.geometry_for(size) for size in self.sizes}
        bound = certified_sigma(self.operand(self.raw), geometries, every_size=self.every_size)
        self.estimate.copy_(estimate)
        self.sigma.fill_(_rounded_up(bound, self.sigma.dtype))

    @property
    def iterated_sigma(self) -> Tensor:
        """The norm that u and v attain."""
        return self.estimate if self.options.bound else self.sigma

    def mark_current(self) -> None:
        """Note that u, v and sigma belong to the raw weight as it is now."""
        self.__dict__["_mark"] = WeightMark(self.raw)  # nn.Module's own way to set it takes ten times as long

    def mark_stale(self) -> None:
        """Have the next use refresh."""
        self._mark = None

    def refresh(self) -> None:
        """Advance the whole group if this raw weight has moved."""
        if self.is_stale():
            self._group.refresh()

    def freeze(self) -> None:
        """Keep the normalised weight, detached, and the state, until as many calls of ``thaw``."""
        if not self._freezes:
            self.refresh()
            if self.geometry is not None:
                self._frozen = self.normalize(self.raw).detach()
        self._freezes += 1

    def thaw(self) -> None:
        self._freezes -= 1
        if not self._freezes:
            self._frozen = None

    # -- use ----------------------------------------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight; refreshes the whole group first if this weight has moved."""
        if self._frozen is not None:
            return self._frozen
        if self.geometry is None:  # the input size is not known before the first forward
            return weight
        # Compiled code cannot see a change: there update_spectral_norm(model) is called after optimizer.step().
        if not torch.compiler.is_compiling() and isinstance(weight, nn.Parameter):
            self.refresh()
        return self.normalize(weight)

    def normalize(self, weight: Tensor) -> Tensor:
        """The normalised weight for the sigma at hand."""
        operand, beta, cap = self.operand(weight), self.options.beta, self.options.cap
        if self.options.full:
            sigma = sigma_through_last_iteration(operand, self.previous, self.known_geometry)
            result = normalize_reference(operand, sigma, beta, cap)
        else:
            group, precision, u = self.buffer("top_group"), self.options.products(), self.state("u")
            if self.options.bound:  # the gradient of the bound, as far as the bound follows the norm in proportion
                u = u * torch.where(self.estimate > 0, self.sigma / self.estimate, 1.0)
            ready = self._group.take_normalized(self) if self.can_be_ready(weight) else None
            sigma, v = self.state("sigma"), self.state("v")
            result = normalize(operand, sigma, u, v, group, self.code, beta, cap, precision, ready)
        if operand is weight:
            return result
        dims = [weight.shape[self.matrix_dim], *weight.shape[: self.matrix_dim], *weight.shape[self.matrix_dim + 1 :]]
        return result.reshape(dims).movedim(0, self.matrix_dim)

    def can_be_ready(self, weight: Tensor) -> bool:
        """Whether the group may compute the normalised weight with others': eager code, on the module's own weight."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or self.geometry is None:
            return False
        return not self.options.full and type(weight) is nn.Parameter and weight is self.raw

    def can_be_ready_with(self, other: SpectralNorm) -> bool:
        if self is other:
            return True
        return self.can_be_ready(self.raw) and not self._freezes and self.raw.device == other.raw.device

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the weight sets the raw weight."""
        return weight

    def observe(self, size: tuple[int, ...]) -> None:
        """Called with the spatial size of each forward's input: start at the first, warn at one not normalised for."""
        if self.geometry is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "spectral_norm: the input size of a convolution is not known yet inside torch.compile; "
                    "give input_size=..., use apply_spectral_norm(model, example_input), or run one eager forward first"
                )
            self.start(size)
            if self._freezes:
                self._frozen = self.normalize(self.raw).detach()
        elif not (self._warned or torch.compiler.is_compiling() or self.covers(size)):
            self._warned = True
            assert self.layer_geometry is not None
            warnings.warn(
                f"sn_fast: {type(self.module).__name__} was normalised for inputs of size "
                f"{self.layer_geometry.input_size} but is used at {size}, where its norm can be larger; "
                "apply spectral_norm again with input_size= the largest size",
                stacklevel=4,
            )

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
        self._group.refresh()  # a copy carries no pending change
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        raw = memo.get(id(self.raw))  # copied before its parametrizations
        twin.__dict__.update(copy.deepcopy({**self.__dict__, "_mark": None, "_freezes": 0, "_frozen": None}, memo))
        twin._mark = None if raw is None else WeightMark(raw)
        twin._group.add(twin)
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralNorm:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer.flatten()).view(buffer.shape)  # flat: a memory format is for the weight alone
                # State stays float32 under .half() and .bfloat16().
                self._buffers[name] = buffer.to(moved.device) if _is_half(moved) else moved
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._group.refresh()  # what is saved belongs to the weight that is saved
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loading is no change of weight; the stored u, v, sigma are taken as they are if they belong to the weight."""
        moved = self.is_stale()  # the raw weight is loaded before its parametrization
        complete = checkpoint.translate(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._buffers.update({k: b.float() for k, b in self._buffers.items() if b is not None and _is_half(b)})
        if self.geometry is None:
            return
        if not complete:
            if moved:
                self.restart()
            return
        self.mark_stale()
        for m in {self, *self._group.members()}:  # layers that share this weight saw it written once more
            if m.geometry is not None and m.raw is self.raw and checkpoint.belongs(m):
                if m.options.bound:  # a proof is not taken on trust
                    m.certify(m.estimate)
                m.mark_current()

    def extra_repr(self) -> str:
        size = "unknown" if self.geometry is None else f"{tuple(self.v.shape)} -> {tuple(self.u.shape)}"
        return f"{size}, beta={self.options.beta:g}, mode={self.options.mode!r}, gradient={self.options.gradient!r}"


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


def refresh(model: nn.Module) -> None:
    """Advance every normalised layer below ``model`` whose raw weight has moved, with its group."""
    for m in spectral_norms(model):
        m.refresh()


def _rounded_up(value: float, dtype: torch.dtype) -> float:
    rounded = torch.tensor(value, dtype=dtype)
    return float(rounded if float(rounded) >= value else torch.nextafter(rounded, torch.tensor(torch.inf, dtype=dtype)))


def _is_half(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < 4
