"""Projection: plain weights, scaled back in place after the optimizer's step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...layers.kinds import kind_of, spatial_axes
from ...layers.linear import as_int, checked_weight, conv_operator
from ...layers.observe import observed_input_sizes
from ...ops.precision import Precision
from ...ops.project_weights import project_weights
from ...ops.records import is_on_host
from ...reference.clip import clip_singular_values
from ...reference.geometry import Geometry
from ..checks import check_has_norm
from ..options import Mode, OperatorName, Options, check_tol
from ..registration import check_layers, size_of_largest_norm
from ..selection import betas_of, chosen_layers
from .after_steps import Handle, after_each_step, parameters_of
from .projected import Projected
from .shards import (
    Part,
    by_groups,
    flats_of,
    is_distributed,
    map_whole,
    part_of,
    project_sharded,
    reshard,
    whole_weight,
)

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
_FIRST_PASSES = 3  # of clipping: the weights of a model that is new to the projection can be far above beta


class SpectralProjection:
    """Keep every layer's spectral norm at most ``beta`` by scaling its weight back, in place, after the optimizer's
    step: ``W <- W / max(1, sigma(W) / beta)`` (Gouk, Frank, Pfahringer, Cree 2021, algorithm 2).

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 10))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> projection = SpectralProjection(model, torch.zeros(1, 3, 8, 8), beta=1.0)
    >>> handle = projection.attach(optimizer)  # or projection.step() after each optimizer.step()

    Nothing is added to the model: its parameters, state_dict, export and wrappers are those of the plain model. The
    layers' norms are those of their true operators, as with ``apply_spectral_norm``, and all advance in one call. The
    state, v and sigma of every layer, lives in this object (``state_dict``); u follows from v in every step. sigma
    starts from 15 Lanczos steps, and then follows the weight by ``n_power_iterations`` per step.

    Args:
        model: the layers' weights are scaled once, here, and after every step. Also a sharded model: see docs/scale.md.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; the model is run on it once, in
            eval mode and without gradients, where the input size of a convolution has to be learnt.
        beta: one value, or {regular expression on the layer's name: value}; the first that matches counts.
        mode: "cap" divides by max(1, sigma / beta); "scale" by sigma / beta.
        n_power_iterations: iterations per step; each starts from v, also those of matrices.
        include: module classes to project; None: Linear and all convolutions.
        exclude: regular expression; layers whose name matches (re.search) are left alone.
        operator: "conv", the layer's true operator; "reshape", the Cout x (Cin k k) matrix.
        tol: iterate further, at most 30 times, until sigma moves by at most tol * sigma in an iteration.
        cap_singular_values: clip the whole spectrum of matrices at beta, not the largest value alone: W = U S V^T
            becomes U min(S, beta) V^T, by matrix products. Convolutions that are no matrices are scaled all the same.
        precision: as of ``spectral_norm``, of the products in the CUDA kernels.

    Raises:
        ValueError, TypeError: an argument is out of range, a layer's weight is made by a parametrization or a hook, or
            its map is not proportional to its weight; the message names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
        *,
        beta: float | Mapping[str, float] = 1.0,
        mode: Mode = "cap",
        n_power_iterations: int = 1,
        include: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
        exclude: str | None = None,
        operator: OperatorName = "conv",
        tol: float | None = None,
        cap_singular_values: bool = False,
        precision: Precision | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
        check_tol(tol)
        if cap_singular_values and mode != "cap":
            raise ValueError(f"cap_singular_values=True caps, and mode={mode!r} does not; leave mode out")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        self.tol = tol
        self.n_power_iterations = as_int("n_power_iterations", n_power_iterations, minimum=1)
        layers = {plain_name(n): m for n, m in chosen_layers(model, example_input, include, exclude).items()}
        betas = betas_of(beta, layers)
        options = {n: Options(b, mode, n_power_iterations, operator, precision=precision) for n, b in betas.items()}
        self._precision = next(iter(options.values())).product_precision
        for name, module in layers.items():
            _check_raw(name, module)
        self._model = model
        self._flats = flats_of(model)
        convolutions = {n: m for n, m in layers.items() if spatial_axes(m)} if operator == "conv" else {}
        used_at = observed_input_sizes(model, convolutions, example_input) if convolutions else {}
        reshard(model)
        sizes = {n: size_of_largest_norm(m, used_at.get(n, [])) for n, m in layers.items()}
        if operator == "conv":
            check_layers({n: (m, sizes[n]) for n, m in layers.items()}, mapped=False)
        self._members = self._made(layers, options, sizes, cap_singular_values)
        self._passes = _FIRST_PASSES
        if not any(getattr(m.weight(), "is_meta", False) for m in self._members):
            self.step()

    def __repr__(self) -> str:
        betas = sorted({m.beta for m in self._members})
        return f"SpectralProjection({len(self._members)} weights, beta={', '.join(f'{b:g}' for b in betas)})"

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Scale the weights back; to be called after each ``optimizer.step()``, also in compiled or captured code.

        All processes of a sharded model call it together.
        """
        self._step(self._members)

    def attach(self, optimizer: Any) -> Handle:
        """Call ``step`` after every step of ``optimizer``, for the weights that it trains.

        Several optimizers can be attached, each for its own weights. A step that GradScaler leaves out is none.

        Args:
            optimizer: of torch.optim, a subclass of those, or any object with a method ``step``.

        Returns:
            A handle, whose ``remove()`` ends it.

        Raises:
            ValueError: the optimizer trains none of the weights, as where it was made before the model was sharded.
        """

        def after() -> None:
            self._step(self._trained_by(optimizer))

        self._trained_by(optimizer)
        return after_each_step(optimizer, after)

    def _trained_by(self, optimizer: Any) -> list[Projected]:
        trained = parameters_of(optimizer)
        if trained is None:
            return self._members
        reshard(self._model)
        found = [m for m in self._members if id(m.weight()) in trained]
        if not found:
            raise ValueError(
                f"SpectralProjection: {type(optimizer).__name__} trains none of the {len(self._members)} projected "
                "weights; make it from the parameters that the model has now (after sharding or replacing them)"
            )
        return found

    @torch.no_grad()
    def _step(self, members: Sequence[Projected]) -> None:
        if not torch.compiler.is_compiling():
            self._check_layers()
            reshard(self._model)
        whole: list[tuple[Projected, Tensor]] = []
        sharded: list[tuple[Projected, Part]] = []
        for m in members:
            held = self._held(m)
            memory = held.local if isinstance(held, Part) else held
            if m.needs_start(memory.device):
                m.start(whole_weight(m, held) if isinstance(held, Part) else held)
            m.move_to(memory)
            if isinstance(held, Part):
                sharded.append((m, held))
            else:
                whole.append((m, held))
        self._clip(whole, sharded)
        for batch in _by_device(whole):
            project_weights(
                [w for _, w in batch],
                [m.u for m, _ in batch],
                [m.v for m, _ in batch],
                [m.sigma for m, _ in batch],
                [m.rows for m, _ in batch],
                [c for m, _ in batch for c in m.code],
                [m.beta for m, _ in batch],
                [m.cap for m, _ in batch],
                self.n_power_iterations,
                self.tol,
                self._precision,
            )
        for pairs in by_groups(sharded):
            project_sharded(pairs, self.n_power_iterations, self.tol, self._precision)

    def _check_layers(self) -> None:
        """Raise where a layer was replaced, or a weight untied: what stands in its place would have no bound."""
        there = {id(module) for module in self._model.modules()}
        for m in self._members:
            for name, module in [(m.name, m.module), *m.tied]:
                problem = ""
                if id(module) not in there:
                    problem = f"layer {name!r} is no longer in the model"
                elif module._parameters.get("weight") is not m.weight():
                    problem = f"layers {m.name!r} and {name!r} no longer share one weight"
                if problem:
                    raise RuntimeError(
                        f"SpectralProjection: {problem}; make a new SpectralProjection, and remove() the handles of "
                        "this one"
                    )

    def _held(self, member: Projected) -> Tensor | Part:
        """The weight, or the part of it that is here."""
        weight = member.weight()
        held = None if weight is None else part_of(weight, member, self._flats)
        there = getattr(weight, "shape", None)
        if held is None or (not isinstance(held, Part) and held.shape != member.shape):
            found = "no parameter 'weight'" if there is None else f"a weight of shape {tuple(there)}"
            raise RuntimeError(
                f"SpectralProjection: layer {member.name!r} has {found} now, and had one of shape "
                f"{tuple(member.shape)}; make a new SpectralProjection (after FullyShardedDataParallel)"
            )
        memory = held.local if isinstance(held, Part) else held
        if memory.is_meta:
            raise RuntimeError(
                f"SpectralProjection: the weight of layer {member.name!r} is on the meta device; load or initialise "
                "it before the first step"
            )
        return held

    def _clip(self, whole: Sequence[tuple[Projected, Tensor]], sharded: Sequence[tuple[Projected, Part]]) -> None:
        """Clip the spectra of matrices, where that is wanted."""
        for m, weight in whole:
            if m.clips:
                weight.copy_(_clipped(m, weight, self._passes))
        for pairs in by_groups([(m, p) for m, p in sharded if m.clips]):
            map_whole(pairs, lambda m, weight: _clipped(m, weight, self._passes))
        if self._passes != 1:
            self._passes = 1

    # -- state --------------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Have the next step find v and sigma anew, for weights that have nothing to do with those before: initialised
        again, or loaded. Without it the iteration takes some tens of steps to come there."""
        for m in self._members:
            m.is_started = False
        self._passes = _FIRST_PASSES

    def sigmas(self) -> dict[str, float]:
        """Of each weight, by layer name, the norm that the last step left it with, as the iteration saw it."""
        return {m.name: float(m.sigma) for m in self._members if m.is_started}

    def state_dict(self) -> dict[str, Tensor]:
        """Of every weight ``NAME.v``, (Cin, *input_size) or, of a matrix, (in,), and the scalar ``NAME.sigma``.

        Not copied. Equal on all ranks: each can save it alone, and torch.distributed.checkpoint saves it once.
        """
        return {f"{m.name}.{key}": t for m in self._members if m.is_started for key, t in m.state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` returned, on any number of ranks.

        Raises:
            ValueError: a tensor is missing, unexpected, or of another shape. TypeError: it is no dict of tensors.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; give what state_dict() returned")
        wanted = {f"{m.name}.{key}": shape for m in self._members for key, shape in m.state_shapes().items()}
        missing, unexpected = wanted.keys() - state_dict.keys(), state_dict.keys() - wanted.keys()
        if missing or unexpected:
            what = f"has no {min(missing)!r}" if missing else f"has {min(unexpected)!r}, which is of no layer here"
            raise ValueError(f"state_dict {what}: it is of another model, or of other include, exclude or operator")
        for key, shape in wanted.items():
            if not isinstance(state_dict[key], Tensor):
                kind = type(state_dict[key]).__name__
                raise TypeError(f"state_dict[{key!r}] is a {kind}; give what state_dict() returned")
            if tuple(state_dict[key].shape) != shape:
                raise ValueError(
                    f"state_dict[{key!r}] has shape {tuple(state_dict[key].shape)}, here it is {shape}: the layer or "
                    "its input size is another one"
                )
        for m in self._members:
            m.load({key: state_dict[f"{m.name}.{key}"] for key in m.state_shapes()})

    # -- construction -------------------------------------------------------------------------------------------------

    def _made(
        self,
        layers: Mapping[str, nn.Module],
        options: Mapping[str, Options],
        sizes: Mapping[str, tuple[int, ...] | None],
        clips: bool,
    ) -> list[Projected]:
        """One for every weight; layers that share one have to agree."""
        found: dict[int, Projected] = {}
        for name, module in layers.items():
            weight, o, kind = module._parameters["weight"], options[name], kind_of(module)
            assert weight is not None
            flat = self._flats.get(id(weight))
            shape = weight.shape if flat is None else flat.shape
            as_matrix = o.operator == "reshape" or kind is None or not kind.axes
            if len(shape) < 2 or (as_matrix and o.operator == "conv" and len(shape) != 2):
                raise ValueError(
                    f"SpectralProjection: layer {name!r} ({type(module).__name__}) has a weight of shape "
                    f"{tuple(shape)}, whose operator is not known; exclude it, or use operator='reshape' for weights "
                    "of 2 to 5 dimensions"
                )
            geometry = Geometry() if as_matrix else _geometry(name, module, shape, sizes[name])
            rows = kind.row_dim(shape) if kind is not None else 0
            member = Projected(name, module, shape, geometry, rows, o.beta, o.cap, clips and _is_matrix(geometry))
            twin = found.setdefault(id(weight), member)
            same_map = twin.geometry == geometry and (twin.rows == member.rows or len(shape) == 2)
            if not same_map or twin.beta != o.beta:
                raise ValueError(
                    f"SpectralProjection: layers {twin.name!r} and {name!r} share one weight, but not their "
                    f"{'beta' if same_map else 'convolution or input size'}; exclude one of them"
                )
            if twin is not member:
                twin.tied.append((name, module))
        return list(found.values())


def plain_name(name: str) -> str:
    """A layer's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name).lstrip(".")


def _by_device(pairs: Iterable[tuple[Projected, Tensor]]) -> list[list[tuple[Projected, Tensor]]]:
    batches: dict[torch.device, list[tuple[Projected, Tensor]]] = {}
    for member, weight in pairs:
        batches.setdefault(weight.device, []).append((member, weight))
    return list(batches.values())


def _clipped(member: Projected, weight: Tensor, passes: int) -> Tensor:
    """The weight with the singular values of its matrix clipped at beta."""
    on_host = is_on_host(weight.device) and not torch.compiler.is_compiling()  # which need not wait for another device
    rows = member.rows if member.is_matrix else 0  # a transposed convolution is the adjoint of the one that W describes
    matrix = weight.movedim(rows, 0)
    clipped = clip_singular_values(matrix.flatten(1), member.beta, None if on_host else passes)
    return clipped.view(matrix.shape).movedim(0, rows)


def _is_matrix(geometry: Geometry) -> bool:
    """Whether the operator is a matrix of the weight's elements: also that of a convolution with one window."""
    return geometry.groups == 1 and all(axis == axis.collapsed() for axis in geometry.axes)


def _check_raw(name: str, module: nn.Module) -> None:
    """Raise unless the layer's weight is a plain parameter."""
    try:
        if parametrize.is_parametrized(module, "weight"):
            checked_weight(module, "weight", on_meta=True)  # raises, with the remedy
        weight = module._parameters.get("weight")
        if weight is None and isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(
                "its weight is no parameter: with FullyShardedDataParallel use use_orig_params=True, and undo pruning "
                "and other hooks that compute a weight"
            )
        if not (is_distributed(weight) or hasattr(weight, "_fsdp_flattened")):
            check_has_norm(module, "weight")
            checked_weight(module, "weight", on_meta=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"SpectralProjection: layer {name!r}: {error}; or leave it alone with exclude=") from None


def _geometry(name: str, module: nn.Module, shape: torch.Size, size: tuple[int, ...] | None) -> Geometry:
    if size is None:
        raise ValueError(
            f"SpectralProjection: the model does not use layer {name!r} on example_input, so its input size is not "
            "known; give another example_input, or leave the layer alone with exclude="
        )
    return conv_operator(module, torch.empty(shape, device="meta"), size).geometry.reduced()
