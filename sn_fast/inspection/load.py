"""A model from its name: a factory ``module:function``, or an architecture of torchvision or timm."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import UserError, failures_explained, require

_ZOOS = ("torchvision", "timm")


@dataclass(frozen=True)
class LoadedModel:
    """A model and its full name, e.g. ``torchvision:resnet50``."""

    name: str
    module: nn.Module


def load_model(model: str, *, pretrained: bool = False) -> LoadedModel:
    """Make the model named ``model``.

    Args:
        model: ``module:function``, imported and called without arguments (a class or an nn.Module instance will do);
            or an architecture of torchvision or timm, of the first that has it, or of ``torchvision:`` or ``timm:``.
        pretrained: with the architecture's published weights, which may have to be downloaded; else initialised anew.

    Raises:
        UserError: there is no such model, or it cannot be made.
    """
    prefix, colon, rest = model.partition(":")
    if colon and prefix not in _ZOOS:
        if pretrained:
            raise UserError("argument `pretrained`: is for names of torchvision and timm; give `checkpoint`")
        return LoadedModel(model, _from_factory(prefix, rest))
    zoo, architecture = (prefix, rest) if colon else _find_zoo(model)
    if colon and architecture not in (names := _names(_imported(zoo))):
        raise UserError(f"argument `model`: {zoo} has no model {architecture!r}{_similar(architecture, names)}")
    return LoadedModel(f"{zoo}:{architecture}", _from_zoo(zoo, architecture, pretrained))


def _from_factory(module_name: str, path: str) -> nn.Module:
    if not module_name or not path or module_name.endswith(".py") or "/" in module_name:
        raise UserError(
            f"argument `model`: invalid value '{module_name}:{path}': give an importable module and a function in it, "
            "e.g. nets:make for def make() in nets.py"
        )
    with failures_explained(f"argument `model`: importing {module_name} failed"):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"argument `model`: there is no module {error.name!r}, neither here nor among the installed packages"
            ) from None
    for part in path.split("."):
        with failures_explained(f"argument `model`: looking up {module_name}:{path} failed"):
            exists = hasattr(found, part)
        if not exists:
            names = [name for name in dir(found) if not name.startswith("_")]
            raise UserError(f"argument `model`: {module_name} has no {path!r}{_similar(part, names)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UserError(
            f"argument `model`: {module_name}:{path} is a {type(found).__name__}; give a function or a model"
        )
    with failures_explained(f"argument `model`: {module_name}:{path}, called without arguments, failed"):
        model = found()
    if not isinstance(model, nn.Module):
        raise UserError(f"argument `model`: {module_name}:{path} returned a {type(model).__name__}, not an nn.Module")
    return model


def _find_zoo(name: str) -> tuple[str, str]:
    installed = [zoo for zoo in _ZOOS if importlib.util.find_spec(zoo) is not None]
    remedy = "give a factory as module:function, e.g. nets:make"
    if not installed:
        raise UserError(
            f"argument `model`: {name!r} is not a module:function, and torchvision and timm are not installed: {remedy}"
            ", or run: pip install torchvision"
        )
    known: list[str] = []
    for zoo in installed:
        names = _names(_imported(zoo))
        if name in names:
            return zoo, name
        known += names
    raise UserError(
        f"argument `model`: {' and '.join(installed)} {'have' if len(installed) > 1 else 'has'} no model "
        f"{name!r}{_similar(name, known)}; or {remedy}"
    )


def _imported(zoo: str) -> ModuleType:
    module = "torchvision.models" if zoo == "torchvision" else zoo
    with failures_explained(f"argument `model`: importing {zoo} failed"):
        return require(module, install=zoo)


def _names(zoo: Any) -> list[str]:
    return list(zoo.list_models())


def _from_zoo(zoo: str, architecture: str, pretrained: bool) -> nn.Module:
    models: Any = _imported(zoo)
    if zoo == "timm":
        arguments: dict[str, Any] = {"pretrained": pretrained}
        create = models.create_model
    else:
        arguments = {"weights": "DEFAULT" if pretrained else None}
        create = models.get_model
        # Detection models would download their backbone's weights.
        if "weights_backbone" in inspect.signature(models.get_model_builder(architecture)).parameters:
            arguments["weights_backbone"] = None
    remedy = "; give its weights with `checkpoint` where there is no network" if pretrained else ""
    with failures_explained(f"argument `model`: making {zoo}:{architecture} failed", remedy):
        model: nn.Module = create(architecture, **arguments)
    return model


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys(names), n=3)
    return f" (similar: {', '.join(close)})" if close else ""
