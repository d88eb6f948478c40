"""The parametrization of one weight, and the rule of its state: sigma belongs to the weight in use.

The buffers u, v and sigma move once after the raw weight has moved, before the weight is used again, and never
otherwise: all forwards, recomputations and backwards of one weight see one sigma, in train and in eval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops import spectral as ops
from ..reference.geometry import Geometry
from ..reference.linear_map import compute_dtype, matvec, rmatvec
from ..reference.normalize import normalize as normalize_reference
from ..reference.power import normalized, sigma_through_last_iteration
from .norm import start_vectors
from .operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, ConvOperator, LinearOperator, chain, whole_window_size

START_ITERATIONS = 15
# A stored sigma that is this far from what the stored u gives does not belong to the stored weight (float32, half).
_SIGMA_MISMATCH = 1e-2


@dataclass(frozen=True)
class Options:
    """How a weight is normalised; see ``sn_fast.spectral_norm``. Raises ValueError for what is out of range."""

    beta: float = 1.0
    mode: str = "cap"
    n_power_iterations: int = 1
    operator: str = "conv"
    gradient: str = "detached"
    reduce: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("cap", "scale"):
            raise ValueError(f"mode={self.mode!r} is unknown; choose 'cap' (at most beta) or 'scale' (exactly beta)")
        if self.operator not in ("conv", "reshape"):
            raise ValueError(f"operator={self.operator!r} is unknown; choose 'conv' (the true operator) or 'reshape'")
        if self.gradient not in ("detached", "full"):
            raise ValueError(f"gradient={self.gradient!r} is unknown; choose 'detached' or 'full'")
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta!r} must be > 0 (inf switches the normalisation off)")
        if self.mode == "scale" and self.beta == math.inf:
            raise ValueError("beta=inf must be finite with mode='scale'")
        check_iterations(self.n_power_iterations)


def check_iterations(n: int) -> None:
    """Raise unless ``n`` is a number of power iterations."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n_power_iterations={n!r} must be an integer >= 1")


class Group:
    """Parametrizations that are refreshed together, in one operator call. Copies of a model get groups of their own."""

    def __init__(self) -> None:
        self.members: list[SpectralNorm] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        # Members are not followed: each copied one joins the new group itself (SpectralNorm.__setstate__).
        return memo.setdefault(id(self), Group())

    def refresh(self) -> None:
        """Advance every member whose raw weight has moved."""
        stale = [m for m in self.members if m.is_stale()]
        if stale:
            advance(stale)


class SpectralNorm(nn.Module):
    """Parametrization W -> W / max(1, sigma / beta), or beta * W / sigma, of one weight.

    Buffers: ``v`` (right singular vector, input space), ``u`` (left, output space), ``sigma`` (scalar, of the raw
    weight); for grouped convolutions also ``top_group``, the group that attains sigma (u, v hold a unit pair per
    group); with ``gradient="full"`` also ``v_prev`` (``u_prev`` for a matrix), the start of the last iteration.
    They are kept in float32 at least, whatever the weight's dtype.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor

    def __init__(self, group: Group, options: Options, *, as_matrix: bool, matrix_dim: int) -> None:
        super().__init__()
        self.options = options
        self.as_matrix = as_matrix
        self.matrix_dim = matrix_dim
        self.geometry: Geometry | None = None
        self._code: list[int] = []
        self._group = group
        self._owner: list[parametrize.ParametrizationList] = []  # in a list: not a submodule
        self._module: list[nn.Module] = []
        self._seen: int | None = None
        self._frozen: Tensor | None = None
        self.sizes: set[tuple[int, ...]] = set()  # seen beforehand, with no larger norm
        self._warned = False
        for name in ("u", "v", "sigma"):
            self.register_buffer(name, torch.empty(0))

    # -- attaching ----------------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, name: str) -> None:
        """Remember where the raw weight lives and join the group."""
        self._owner = [chain(module, name)]
        self._module = [module]
        self._group.members.append(self)

    @property
    def raw(self) -> Tensor:
        """The raw weight."""
        return self._owner[0].original

    def operand(self, weight: Tensor) -> Tensor:
        """The weight as the operators take it: as it is, or as the matrix (first dimension, rest)."""
        if not self.as_matrix:
            return weight
        return weight.movedim(self.matrix_dim, 0).flatten(1)

    def start(self, input_size: Sequence[int] | None) -> None:
        """Fix the geometry and find u, v, sigma of the current weight by Lanczos, then one power iteration."""
        with torch.inference_mode(False), torch.no_grad():  # the buffers must not be inference tensors
            operator = self._operator(input_size)
            self._set_geometry(operator.geometry)
            self.u, self.v = start_vectors(operator, START_ITERATIONS)
            self.sigma = self.u.new_ones(())
            advance([self], 1)

    def _operator(self, input_size: Sequence[int] | None) -> LinearOperator:
        weight = self.operand(self.raw.detach())
        module = self._module[0]
        if self.as_matrix or input_size is None:
            return LinearOperator(weight, Geometry())
        assert isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS)
        operator = ConvOperator(
            weight,
            tuple(input_size),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            transposed=module.transposed,
            output_padding=module.output_padding,
        )
        return operator.reduced() if self.options.reduce else operator

    def _set_geometry(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._code = geometry.encode()
        device = self.raw.device
        if geometry.groups > 1 and not hasattr(self, "top_group"):
            self.register_buffer("top_group", torch.zeros((), dtype=torch.int64, device=device))
        if self.options.gradient == "full" and not hasattr(self, self._prev_name):
            self.register_buffer(self._prev_name, torch.empty(0, device=device))  # set by the first iteration

    @property
    def _prev_name(self) -> str:
        return "u_prev" if self.as_matrix else "v_prev"

    # -- state --------------------------------------------------------------------------------------------------------

    def is_stale(self) -> bool:
        """Whether the raw weight has moved since sigma was computed."""
        return self.geometry is not None and self._seen != _version(self.raw)

    def mark_current(self) -> None:
        """Note that u, v and sigma belong to the raw weight as it is now."""
        self._seen = _version(self.raw)

    def refresh(self) -> None:
        """Advance the whole group if this raw weight has moved."""
        if self.is_stale():
            self._group.refresh()

    def freeze(self) -> None:
        """Keep the normalised weight, detached, until ``_frozen`` is reset."""
        self.refresh()
        self._frozen = self.normalize(self.raw).detach()

    def leave(self) -> None:
        """Leave the group, with a sigma of the current weight."""
        self.refresh()
        self._group.members.remove(self)

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight; refreshes the whole group first if this weight has moved."""
        if self._frozen is not None:
            return self._frozen
        if self.geometry is None:  # the input size is not known before the first forward
            return weight
        # Compiled code cannot see a version: there update_spectral_norm(model) is called after optimizer.step().
        if not torch.compiler.is_compiling() and isinstance(weight, nn.Parameter):
            self.refresh()
        return self.normalize(weight)

    def normalize(self, weight: Tensor) -> Tensor:
        """The normalised weight for the sigma at hand."""
        operand = self.operand(weight)
        cap = self.options.mode == "cap"
        if self.options.gradient == "full":
            sigma = sigma_through_last_iteration(operand, getattr(self, self._prev_name), self._known_geometry)
            result = normalize_reference(operand, sigma, self.options.beta, cap)
        else:
            group = self._buffers.get("top_group")
            result = ops.normalize(operand, self.sigma, self.u, self.v, group, self._code, self.options.beta, cap)
        if not self.as_matrix:
            return result
        dims = [weight.shape[self.matrix_dim], *weight.shape[: self.matrix_dim], *weight.shape[self.matrix_dim + 1 :]]
        return result.reshape(dims).movedim(0, self.matrix_dim)

    @property
    def _known_geometry(self) -> Geometry:
        assert self.geometry is not None
        return self.geometry

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the weight sets the raw weight."""
        return weight

    # -- the size of the input ----------------------------------------------------------------------------------------

    def observe(self, size: tuple[int, ...]) -> None:
        """Called with the spatial size of each forward's input: start at the first, warn at one not normalised for."""
        if self.geometry is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "spectral_norm: the input size of a convolution is not known yet inside torch.compile; "
                    "give input_size=..., use apply_spectral_norm(model, example_input), or run one eager forward first"
                )
            self.start(size)
        elif not (self._warned or torch.compiler.is_compiling() or self.covers(size)):
            self._warned = True
            warnings.warn(
                f"sn_fast: {type(self._module[0]).__name__} was normalised for inputs of size "
                f"{self._known_geometry.input_size} but is used at {size}, where its norm can be larger; "
                "apply spectral_norm again with input_size= the largest size",
                stacklevel=4,
            )

    def covers(self, size: tuple[int, ...]) -> bool:
        """Whether the norm at this input size is known to be at most the one in use.

        With zero padding a smaller input is a restriction of a larger one, so the norm grows with the size. A collapsed
        axis has the same norm at every size.
        """
        geometry = self._known_geometry
        if not geometry.axes or size in self.sizes:
            return True
        whole = whole_window_size(self._module[0])
        return all(
            (w is not None and axis == axis.collapsed()) or (want <= have if geometry.mode == "zeros" else want == have)
            for axis, w, have, want in zip(geometry.axes, whole, geometry.input_size, size, strict=True)
        )

    # -- copying, moving, saving, loading -----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._group.refresh()  # a copy carries no pending change
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._group.members.append(self)
        self._seen = 0  # copied tensors start at version 0: a later change is seen as one

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralNorm:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                kept = before[name]
                assert kept is not None
                self._buffers[name] = kept.to(buffer.device)  # state stays float32 under .half() and .bfloat16()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._group.refresh()  # what is saved belongs to the weight that is saved
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loading is no change of weight; the stored u, v, sigma are taken as they are if they belong to the weight."""
        moved = self.is_stale()  # the raw weight is loaded before its parametrization
        complete = self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.geometry is None:
            return
        if complete:
            self.mark_current()
            if not self._is_consistent():
                self._seen = None  # stale: refreshed at the next use
        elif moved:
            self._restart()

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Make the stored entries ours; returns whether they hold singular vectors of this operator."""
        u, v = (state_dict.pop(f"{prefix}_{name}", None) for name in ("u", "v"))
        if u is not None and v is not None:  # torch.nn.utils.parametrizations.spectral_norm
            fits = u.shape == self.u.shape and v.shape == self.v.shape
            state_dict.update({prefix + name: buffer for name, buffer in self._buffers.items()})
            if fits:  # those of a reshaped kernel say nothing about the convolution
                sigma = torch.full_like(self.sigma, math.nan)
                state_dict.update({prefix + "u": u, prefix + "v": v, prefix + "sigma": sigma})
            return fits
        u, v = state_dict.get(prefix + "u"), state_dict.get(prefix + "v")
        if u is None or v is None:
            return False
        if self.geometry is None and v.numel():
            self._adopt_sizes(u, v)
        return True

    def _adopt_sizes(self, u: Tensor, v: Tensor) -> None:
        """Take the geometry of a layer that has not seen an input yet from the shapes of stored vectors."""
        literal = tuple(v.shape[1:])
        whole = tuple(w or s for w, s in zip(whole_window_size(self._module[0]), literal, strict=True))
        for size in (whole, literal):
            operator = self._operator(size)
            if (operator.out_shape, operator.in_shape) == (u.shape, v.shape):
                break
        self._set_geometry(operator.geometry)
        like = self.raw.new_empty((), dtype=compute_dtype(self.raw))
        self.u, self.v, self.sigma = like.new_empty(u.shape), like.new_empty(v.shape), like
        for name in self._buffers:
            if name.endswith("_prev"):
                setattr(self, name, torch.empty_like(self.u if name == "u_prev" else self.v))

    def _restart(self) -> None:
        with torch.no_grad():
            operator = LinearOperator(self.operand(self.raw.detach()), self._known_geometry)
            for buffer, vector in zip((self.u, self.v), start_vectors(operator, START_ITERATIONS)):
                buffer.copy_(vector)
        advance([self], 1)

    def _is_consistent(self) -> bool:
        """Whether the stored sigma is the norm of A^T u (of A v for a matrix): false after averaging of checkpoints."""
        if self.raw.is_meta:
            return True
        with torch.no_grad():
            weight = self.operand(self.raw)
            weight = weight.to(compute_dtype(weight))
            geometry = self._known_geometry
            start, back = (self.u, rmatvec) if geometry.axes else (self.v, matvec)
            image = back(start[None].to(weight.dtype), weight, geometry)
            _, norms = normalized(image, image, geometry.groups)
            _, lengths = normalized(start[None].to(weight.dtype), start[None], geometry.groups)
            sigma = self.sigma.to(weight.dtype)
            fits = (norms.amax() - sigma).abs() <= _SIGMA_MISMATCH * sigma
            return bool(fits & ((lengths - 1).abs().amax() <= _SIGMA_MISMATCH))

    def extra_repr(self) -> str:
        size = "unknown" if self.geometry is None else f"{tuple(self.v.shape)} -> {tuple(self.u.shape)}"
        return f"{size}, beta={self.options.beta:g}, mode={self.options.mode!r}, gradient={self.options.gradient!r}"


def advance(members: Iterable[SpectralNorm], n_power_iterations: int | None = None) -> None:
    """Advance u, v, sigma of these parametrizations, all that share a device and a number of iterations in one call."""
    batches: dict[tuple[torch.device, int, bool], list[SpectralNorm]] = {}
    for m in members:
        n = n_power_iterations or m.options.n_power_iterations
        batches.setdefault((m.u.device, n, m.options.gradient == "full"), []).append(m)
    with torch.no_grad():
        for (_, n, full), batch in batches.items():
            weights = [m.operand(m.raw) for m in batch]
            us, vs = [m.u for m in batch], [m.v for m in batch]
            code = [c for m in batch for c in m._code]
            if full and n > 1:
                us, vs, _, _ = ops.power_step(weights, us, vs, code, n - 1)
            if full:
                for m, u, v in zip(batch, us, vs):
                    setattr(m, m._prev_name, (u if m.as_matrix else v).clone())
            us, vs, sigmas, groups = ops.power_step(weights, us, vs, code, 1 if full else n)
            for m, u, v, sigma, group in zip(batch, us, vs, sigmas, groups):
                m.u.copy_(u)
                m.v.copy_(v)
                m.sigma.copy_(sigma)
                top_group = m._buffers.get("top_group")
                if top_group is not None:
                    top_group.copy_(group)
                if not torch.compiler.is_compiling():
                    m.mark_current()


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _bump_versions_after_fused_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers write their parameters without bumping ``_version``: do it for them."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_bump_versions_after_fused_step)
