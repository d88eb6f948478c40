"""Normalising layers and whole models."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import users_stacklevel
from ..layers.kinds import spatial_axes
from ..layers.linear import as_int, chain
from ..layers.observe import observed_input_sizes
from ..ops.precision import Precision
from .checks import check_can_run, check_none_shares, check_not_flat
from .data_parallel import leave_out
from .gathered import advance_distributed, gathered, is_away, refresh_sharded, start_sharded, update_distributed
from .hooks import check_once_per_forward, remove_hooks
from .options import Gradient, InputSize, Mode, OperatorName, Options
from .parametrization import SpectralNorm, freeze, refresh, spectral_norms, start_together
from .refresh import readable, update
from .registration import Registered, are_large, check_layers, register, size_of_largest_norm, unregister
from .replacing import replaced
from .selection import betas_of, chosen_layers
from .sharding import own_name, reshard, shards_of, tensor_parallel_shards, whole_on_meta

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def spectral_norm(
    module: ModuleT,
    name: str = "weight",
    *,
    input_size: InputSize = None,
    beta: float = 1.0,
    mode: Mode = "cap",
    n_power_iterations: int = 1,
    operator: OperatorName = "conv",
    gradient: Gradient = "detached",
    reduce: bool = True,
    precision: Precision | None = None,
    bound: bool = False,
    tol: float | None = None,
    replace: bool = False,
) -> ModuleT:
    """Normalise one layer's weight by the norm of its true linear map; equivalent to
    ``W / max(1, sigma(W) / beta)`` in place of ``W`` (Farnia, Zhang, Tse 2019, section 4).

    Args:
        module: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding, or any module whose ``name`` is 2-D.
        input_size: spatial size of a convolution's input, e.g. ``(32, 32)``; other libraries call it input_dim or
            input_shape. None: taken from the first forward (until then the weight is not normalised). "any": sigma is
            a certified bound for every input size (except where the norm is the same at every size: 1x1, patches).
        beta: the largest norm allowed ("cap") or the norm wanted ("scale"). Other libraries call it coeff,
            norm_multiplier or k_coef_lip.
        mode: "cap" divides by max(1, sigma / beta); "scale" by sigma / beta, as torch's spectral_norm with beta=1.
        n_power_iterations: iterations per change of the weight. sigma starts from 15 Lanczos steps.
        operator: "conv", the layer's true operator; "reshape", the Cout x (Cin k k) matrix, as torch does.
        gradient: "detached" holds the singular vectors constant, as torch does; "full" differentiates through the last
            power iteration, as the published code does.
        reduce: iterate in the smallest space with the same norm (u and v of a 1x1 convolution are then those of its
            matrix). False keeps u (Cout, *output_size) and v (Cin, *input_size) for every convolution.
        precision: of the products in the CUDA kernels; sums are float32 always. "fp32", "tf32", "3xtf32" (tensor cores,
            about float32's accuracy) or "bf16". None: as torch.set_float32_matmul_precision says, "highest" fp32,
            "high" tf32, "medium" bf16. Without kernels products are exact in float32.
        bound: sigma is a certified upper bound, computed anew at every change of the weight (``operator_norm_bound``,
            which costs far more than a power iteration), so the layer's norm is provably at most beta, rounding of the
            weight included. The power iteration's value is kept in the buffer ``estimate``, for the gradient.
        tol: at each change of the weight go on until sigma is within about tol * sigma of the norm, such as 1e-2: one
            iteration more, and at most two rounds of 15 Lanczos steps. On a GPU each change takes as long as all of
            them, for nothing waits for the device. Below 3e-3 float32 cannot tell (docs/sigma.md).
        replace: if the weight has PyTorch's spectral norm, ``torch.nn.utils.spectral_norm`` or
            ``torch.nn.utils.parametrizations.spectral_norm``, take that off first. The raw weight stays, the same
            Parameter, so an optimizer that holds it goes on. Its u and v stay too where both iterate the same matrix
            (Linear, Embedding, ``operator="reshape"``) and they fit the weight; elsewhere sigma starts anew.

    Returns:
        ``module``, its weight now a parametrization with buffers u, v and sigma.

    Raises:
        ValueError, TypeError: an argument is out of range, or the module cannot be normalised; the message says why.
            A layer whose own forward or hooks make another map of the weight (weight standardisation, an adapter beside
            it, a scaled output) cannot.
    """
    options = Options(beta, mode, n_power_iterations, operator, gradient, reduce, precision, bound, tol)
    with replaced([module] if replace and isinstance(module, nn.Module) else [], name) as theirs:
        made = register(module, name, input_size, options, hashed=are_large([module], name))
        try:
            _start([made])
        except BaseException:
            unregister(module, name, keep_raw=True)
            raise
        if module in theirs:
            theirs[module].hand_over(made.parametrization)
    return module


def apply_spectral_norm(
    model: ModuleT,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    beta: float | Mapping[str, float] = 1.0,
    mode: Mode = "cap",
    n_power_iterations: int = 1,
    include: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    exclude: str | None = None,
    operator: OperatorName = "conv",
    gradient: Gradient = "detached",
    reduce: bool = True,
    precision: Precision | None = None,
    bound: bool = False,
    tol: float | None = None,
    replace: bool = False,
) -> ModuleT:
    """Normalise every Linear and (transposed) convolution of a model, as one group that advances in one call.

    Args:
        model: changed in place and returned. Sharded by FSDP or tensor-parallel: all ranks have to call.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; the model is run on it once, in
            eval mode and without gradients, to learn every layer's input size (on shapes alone if it is on meta).
            Batch size 1 is enough. A layer used at several sizes is normalised for the size with the largest norm.
        beta: one value, or {regular expression on the layer's name: value}; the first that matches counts.
        include: module classes to normalise; None: Linear and all convolutions.
        exclude: regular expression; layers whose name matches (re.search) are left alone.
        mode, n_power_iterations, operator, gradient, reduce, precision, bound, tol, replace: see ``spectral_norm``.

    Raises:
        ValueError: no layer is left to normalise, a pattern matches none, or none matches a layer; or layers whose map
            is not proportional to their weight (``spectral_norm``), by name.
    """
    layers = chosen_layers(model, example_input, include, exclude)
    betas = betas_of(beta, layers)
    check_not_flat(model, layers)
    convolutions = {n: m for n, m in layers.items() if spatial_axes(m)}
    with replaced(layers.values() if replace else [], "weight") as theirs:
        parallel = tensor_parallel_shards(layers.values())
        distributed = {shard.module for shard in parallel}
        shards = [*(s for s in shards_of(model, layers.values()) if s.module not in distributed), *parallel]
        if convolutions and operator == "conv":
            check_can_run(shards)
        sizes: dict[str, list[tuple[int, ...]]] = {}
        if operator == "conv" and (convolutions or not shards):  # a sharded model's forward would gather it for nothing
            sizes = observed_input_sizes(model, convolutions, example_input)
            reshard(model)
            _warn_of_uncalled([n for n in convolutions if n not in sizes])
        with whole_on_meta(shards):
            largest = {n: size_of_largest_norm(m, sizes.get(n, [])) for n, m in layers.items()}
            mapped: dict[str, bool] = {}
            if operator == "conv":
                mapped = check_layers({n: (m, largest[n]) for n, m in layers.items()}, mapped=not bound)
            hashed = bool(shards) or are_large(layers.values())
            done: list[nn.Module] = []
            made: list[Registered] = []
            layer: str | None = None  # at fault
            try:
                for layer, module in layers.items():
                    options = Options(
                        betas[layer], mode, n_power_iterations, operator, gradient, reduce, precision, bound, tol
                    )
                    made.append(
                        register(
                            module,
                            "weight",
                            largest[layer],
                            options,
                            hashed=hashed,
                            used_at=sizes.get(layer, []),
                            distributed=module in distributed,
                            mapped=mapped.get(layer),
                        )
                    )
                    done.append(module)
                    made[-1].parametrization.path = layer
                layer = None
                _start(made)
                for module, (parametrization, _, _) in zip(done, made, strict=True):
                    if module in theirs:
                        theirs[module].hand_over(parametrization)
            except BaseException as error:
                for module in done:
                    unregister(module, "weight", keep_raw=True)
                if type(error) in (ValueError, TypeError) and layer is not None:
                    calls = re.sub(r"\(module\b", lambda _: f"(model.get_submodule({layer!r})", str(error))
                    raise type(error)(f"layer {layer!r}: {calls}") from error
                raise
    if shards:
        start_sharded(model)
    check_once_per_forward(model)
    leave_out(model)
    return model


def _start(made: Sequence[Registered]) -> None:
    start_together([(parametrization, size) for parametrization, size, is_ready in made if is_ready])


def _warn_of_uncalled(names: Sequence[str]) -> None:
    if names:
        many = len(names) > 1
        warnings.warn(
            f"sn_fast: the model's forward on example_input, in eval mode, does not call layer{'s' * many} "
            f"{', '.join(map(repr, names))}: {'each' if many else 'it'} is normalised from the first call of its own "
            "on, at the size of that input. If the model uses its weight without a call, leave it out with exclude= "
            "and normalise it by spectral_norm(layer, input_size=...)",
            stacklevel=users_stacklevel(),
        )


def update_spectral_norm(model: nn.Module, n_power_iterations: int | None = None) -> None:
    """Advance u, v and sigma of every layer now, in one call.

    No code needs the call: a layer refreshes itself when the content of its weight has changed, however it was written.
    It is for more iterations at one moment, such as after a new initialisation on a GPU or before an evaluation.

    A sharded model's weights are gathered for it, so all ranks have to call.

    Args:
        n_power_iterations: None: each layer's own number.
    """
    if n_power_iterations is not None:
        n_power_iterations = as_int("n_power_iterations", n_power_iterations, minimum=1)
    update(readable(spectral_norms(model)), n_power_iterations)
    update_distributed(model, n_power_iterations)
    parallel = partial(advance_distributed, n_power_iterations=n_power_iterations)
    for pairs in gathered(model, "update_spectral_norm(model)", parallel=parallel):
        update(pairs, n_power_iterations)


@contextmanager
def frozen_sigma(model: nn.Module) -> Iterator[None]:
    """Within this context every normalised weight is computed once, detached, and no state moves.

    For many forwards with one weight, such as the steps of an attack. A change of weight inside is not seen.
    """
    members = spectral_norms(model)
    with torch.inference_mode(False), torch.no_grad():
        freeze(members)
    try:
        yield
    finally:
        for m in members:
            m.thaw()


def remove_spectral_norm(module_or_model: ModuleT) -> ModuleT:
    """Remove the normalisation from a layer, or from every layer of a model; the normalised weight stays in place.

    Raises:
        ValueError: nothing here is normalised by sn_fast; another parametrization sits on the same weight; or a layer
            below ``module_or_model`` shares the raw weight, and would change with it.
    """
    found = list(normalised_modules(module_or_model))
    if not found:
        raise ValueError("remove_spectral_norm: no layer here is normalised by sn_fast")
    for path, module, name in found:
        if len(chain(module, name)) > 1:
            raise ValueError(
                f"{type(module).__name__}.{name} has other parametrizations too, and PyTorch removes all at once: use "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
            )
        if any(is_away(p) for p in spectral_norms(module)):
            raise ValueError(
                f"remove_spectral_norm: {name!r} of layer {path!r} is sharded; save the model's state dict, load it "
                "into a normalised model that is not sharded, and remove the normalisation there"
            )
    check_none_shares(module_or_model, found)
    for _, module, name in found:
        unregister(module, name, keep_raw=False)
    for module in module_or_model.modules():
        if not spectral_norms(module):
            remove_hooks(module)
    return module_or_model


def sigmas(model: nn.Module) -> dict[str, float]:
    """Current sigma of every normalised layer's raw weight, by layer name (a layer with an unknown size is left out).

    Of a sharded model all ranks have to call this where weights have moved since the last forward.

    The layer in use has norm min(sigma, beta) under mode "cap" and beta under "scale".
    """
    found = [(n, m) for n, m in _parametrizations(model) if m.geometry is not None]
    refresh(model)
    refresh_sharded(model, "sigmas(model)")
    return {name: float(m.sigma) for name, m in found if not m.sigma.is_meta}


def normalised_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, parameter name) of every normalised weight below ``model``."""
    for path, module in model.named_modules():
        if "parametrizations" in module._modules and parametrize.is_parametrized(module):  # a wrapper shows its layer's
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name in module.parametrizations:
                if any(isinstance(p, SpectralNorm) for p in chain(module, name)):
                    yield own_name(path), module, name


def _parametrizations(model: nn.Module) -> Iterator[tuple[str, SpectralNorm]]:
    """(layer name, parametrization) of every normalised weight; the parameter's name is added unless "weight"."""
    for path, module, name in normalised_modules(model):
        for p in chain(module, name):
            if isinstance(p, SpectralNorm):
                yield (path if name == "weight" else f"{path}.{name}".lstrip(".")), p
