"""The weights of a model from a file."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, failures_explained, first_line, require
from .allowed import allowed, blocked

_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
_AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile, and wrappers of training
_COUNTERS = ("n_averaged",)  # of AveragedModel
_SHOWN = 3


def load_checkpoint(model: nn.Module, checkpoint: Path, allow_classes: Collection[str] = ()) -> None:
    """Load a state dict, as it is or nested as training scripts do it, into ``model``.

    Args:
        checkpoint: written by torch.save, or a .safetensors file.
        allow_classes: names, module.Class, of what the file may hold beside tensors; only for files that are trusted.

    Raises:
        UserError: the file cannot be read, holds no state dict, one of another model, or objects of other classes.
    """
    document = _read(checkpoint, allow_classes)
    with failures_explained("argument `model`: reading the model's state dict failed"):
        own = model.state_dict()
    state = _renamed(_state_dict(document, checkpoint), own.keys())
    _check_dtypes(state, own, {name for name, _ in model.named_parameters()}, checkpoint)
    on_meta = any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in own.values())
    tied = _tied(model) if on_meta else []
    with failures_explained(f"argument `checkpoint`: loading {checkpoint} into the model failed"):
        try:
            # Tensors on the meta device have no values to copy to: those of the file take their place.
            missing, unexpected = model.load_state_dict(state, strict=False, assign=on_meta)
        except RuntimeError as error:
            raise UserError(f"argument `checkpoint`: {checkpoint} is not of this model: {_misfit(error)}") from None
    faults = [_few(missing, "missing"), _few(unexpected, "not in the model")]
    if any(faults):
        raise UserError(f"argument `checkpoint`: {checkpoint} is not of this model: {'; '.join(filter(None, faults))}")
    for names in tied:
        _tie(model, names)


def _read(path: Path, allow_classes: Collection[str]) -> Any:
    try:
        exists = path.is_file()
    except OSError as error:  # too long a name, or a folder that may not be read
        raise UserError(f"argument `checkpoint`: cannot open {path}: {error.strerror}") from None
    if not exists:
        raise UserError(f"argument `checkpoint`: there is no file {path}")
    if path.suffix == ".safetensors":
        load_file = require("safetensors.torch", install="safetensors").load_file
    else:
        load_file = _torch_load
    with allowed(allow_classes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's on its own storages, whatever the file holds
        try:
            return load_file(path)
        except pickle.UnpicklingError as error:
            if "Unsupported operand" in str(error):  # not of Python's pickle format at all
                raise UserError(f"argument `checkpoint`: {path} was not written by torch.save") from None
            reason = blocked(path, error, allow_classes)
            raise UserError(f"argument `checkpoint`: {reason or f'{path} cannot be read ({_reason(error)})'}") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a damaged file can fail in any way, and so can an allowed class
            raise UserError(f"argument `checkpoint`: {path} cannot be read ({first_line(error)})") from None


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch.load says, without its advice to load the file without any check."""
    return first_line(pickle.UnpicklingError(str(error).rpartition("WeightsUnpickler error: ")[2]))


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(document: Any, path: Path) -> Mapping[str, Any]:
    found = document.state_dict() if isinstance(document, nn.Module) else document
    while isinstance(found, Mapping):
        nested = next((found[key] for key in (*_NESTED, *_AVERAGED) if isinstance(found.get(key), Mapping)), None)
        if nested is None:
            break
        found = nested
    if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
        if unnamed := [key for key in found if not isinstance(key, str)]:
            raise UserError(
                f"argument `checkpoint`: {path} holds a dict of tensors whose keys are not names of parameters "
                f"({_few(list(map(repr, unnamed)), 'of another type')}): save model.state_dict()"
            )
        return found
    content = f"keys {', '.join(map(str, list(found)[:8]))}" if isinstance(found, Mapping) else type(found).__name__
    raise UserError(
        f"argument `checkpoint`: {path} holds no state dict, neither plain nor under {', '.join(_NESTED[:4])}, ... "
        f"({content}): save model.state_dict()"
    )


def _renamed(state: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Without the prefixes that wrappers put before the model's own names."""
    renamed = {}
    for key, value in state.items():
        name = key
        while name not in names and (prefix := next(filter(name.startswith, _PREFIXES), None)):
            name = name.removeprefix(prefix)
        if "_orig_mod." in key and name not in names:  # a part of the model was compiled
            name = name.replace("_orig_mod.", "")
        if name not in _COUNTERS or name in names:
            renamed[name] = value
    return renamed


def _check_dtypes(state: Mapping[str, Any], own: Mapping[str, Any], parameters: Collection[str], path: Path) -> None:
    """Refuse what load_state_dict would cut off without an error, or cannot copy."""
    faults = []
    for name, value in state.items():
        target = own.get(name)
        if not isinstance(value, Tensor) or not isinstance(target, Tensor):
            continue
        if value.layout not in (torch.strided, target.layout):
            faults.append(f"{name}: {str(value.layout).removeprefix('torch.')}")
        elif value.is_quantized != target.is_quantized or (name in parameters and _loses(value, target)):
            faults.append(f"{name}: {str(value.dtype).removeprefix('torch.')}")
    if faults:
        raise UserError(
            f"argument `checkpoint`: {path} is not of this model: {_few(faults, 'not dense floating-point numbers')}; "
            "convert them, e.g. by to_dense() or dequantize(), and save them again"
        )


def _loses(value: Tensor, target: Tensor) -> bool:
    """An imaginary part, or the scale that integers had."""
    return target.is_floating_point() and not value.is_floating_point()


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same, which loading by assignment makes several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    parameter = model.get_parameter(names[0])
    for name in names[1:]:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameter)


def _misfit(error: RuntimeError) -> str:
    """load_state_dict names every tensor that does not fit, one per line."""
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    return _few([line[:300] for line in lines], "other shape") if lines else first_line(error)


def _few(names: Collection[str], what: str) -> str:
    shown = [*list(names)[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])]
    return f"{len(names)} {what} ({', '.join(shown)})" if names else ""
