"""The weights of a model from a file."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line, require

_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
_AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile, and wrappers of training
_COUNTERS = ("n_averaged",)  # of AveragedModel
_SHOWN = 3


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict, as it is or nested as training scripts do it, into ``model``.

    Raises:
        UserError: the file cannot be read, holds no state dict, or one of another model.
    """
    state = _renamed(_state_dict(_read(path), path), model.state_dict().keys())
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        shapes = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f"argument --checkpoint: {path} is not of this model: {_few(shapes, 'other shape')}") from None
    faults = [_few(missing, "missing"), _few(unexpected, "not in the model")]
    if any(faults):
        raise UserError(f"argument --checkpoint: {path} is not of this model: {'; '.join(filter(None, faults))}")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"argument --checkpoint: there is no file {path}")
    if path.suffix == ".safetensors":
        load_file = require("safetensors.torch", install="safetensors").load_file
    else:
        load_file = _torch_load
    try:
        return load_file(path)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # not of Python's pickle format at all
            raise UserError(f"argument --checkpoint: {path} was not written by torch.save") from None
        raise UserError(
            f"argument --checkpoint: {path} holds more than tensors and numbers, and loading it could run any program: "
            "save model.state_dict() in place of the model"
        ) from None
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"argument --checkpoint: {path} cannot be read ({first_line(error)})") from None


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(document: Any, path: Path) -> Mapping[str, Any]:
    found = document
    while isinstance(found, Mapping):
        nested = next((found[key] for key in (*_NESTED, *_AVERAGED) if isinstance(found.get(key), Mapping)), None)
        if nested is None:
            break
        found = nested
    if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
        return found
    content = f"keys {', '.join(map(str, list(found)[:8]))}" if isinstance(found, Mapping) else type(found).__name__
    raise UserError(
        f"argument --checkpoint: {path} holds no state dict, neither plain nor under {', '.join(_NESTED[:4])}, ... "
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


def _few(names: Collection[str], what: str) -> str:
    shown = [*list(names)[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])]
    return f"{len(names)} {what} ({', '.join(shown)})" if names else ""
