from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from sn_fast.errors import UserError
from sn_fast.inspection import load_model


def test_a_factory_a_class_and_an_instance(nets):
    assert load_model("nets:small").name == "nets:small"
    assert type(load_model("nets:Small").module).__name__ == "Small"
    assert load_model("nets:model").module is sys.modules["nets"].model
    assert load_model("torch.nn:Identity").module.training


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere:make", "argument `model`: there is no module 'nowhere'"),
        ("torch.nowhere:make", "argument `model`: there is no module 'torch.nowhere'"),
        ("nets.py:small", "invalid value 'nets.py:small': give an importable module and a function in it"),
        ("nets:", "invalid value 'nets:': give an importable module"),
        ("nets:smal", "nets has no 'smal' (similar: small, Small)"),
        ("nets:number", "nets:number is a int; give a function or a model"),
        ("nets:no_model", "nets:no_model returned a int, not an nn.Module"),
        ("nets:takes", "nets:takes, called without arguments, failed: TypeError: takes() missing 1 required"),
        ("broken:f", "importing broken failed: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("lacking:f", "importing lacking failed: ModuleNotFoundError: No module named 'something_it_needs'"),
    ],
)
def test_what_is_no_model_says_so(nets, name, expected):
    with pytest.raises(UserError) as caught:
        load_model(name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_factory_that_fails_says_where(nets):
    with pytest.raises(UserError, match=r"RuntimeError: the weights are on holiday \(.*nets\.py, line 24\)$"):
        load_model("nets:failing")


def test_pretrained_is_for_names(nets):
    with pytest.raises(UserError, match=r"argument `pretrained`: .* give `checkpoint`"):
        load_model("nets:small", pretrained=True)


class Zoo:
    """A stand-in for torchvision.models or timm: two names, and what it was asked for."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def list_models(self) -> list[str]:
        return self.names

    def create_model(self, name: str, **arguments: Any) -> nn.Module:
        self.asked.append((name, arguments))
        if arguments.get("pretrained") or arguments.get("weights"):
            raise OSError("no network\nat all")
        return nn.Linear(2, 2)

    get_model = create_model

    def get_model_builder(self, name: str) -> Any:
        def detector(*, weights: Any = None, weights_backbone: Any = "IMAGENET1K_V1") -> None: ...

        def classifier(*, weights: Any = None) -> None: ...

        return detector if name == "detector" else classifier


@pytest.fixture
def zoos(monkeypatch: pytest.MonkeyPatch) -> dict[str, Zoo]:
    """torchvision and timm, both installed, with a few models."""
    found = {"torchvision": Zoo(["resnet9", "detector"]), "timm": Zoo(["resnet9", "mixer"])}
    for name, zoo in found.items():
        package = types.ModuleType(name)
        package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, package)
        target = "torchvision.models" if name == "torchvision" else name
        module: Any = types.ModuleType(target) if target != name else package
        for method in ("list_models", "create_model", "get_model", "get_model_builder"):
            setattr(module, method, getattr(zoo, method))
        monkeypatch.setitem(sys.modules, target, module)
    return found


def test_names_of_two_zoos(zoos):
    assert load_model("resnet9").name == "torchvision:resnet9"
    assert load_model("timm:resnet9").name == "timm:resnet9"
    assert load_model("mixer").name == "timm:mixer"
    assert zoos["timm"].asked == [("resnet9", {"pretrained": False}), ("mixer", {"pretrained": False})]
    assert zoos["torchvision"].asked == [("resnet9", {"weights": None})]


def test_a_detector_is_made_without_its_backbones_weights(zoos):
    load_model("detector")
    assert zoos["torchvision"].asked == [("detector", {"weights": None, "weights_backbone": None})]


def test_unknown_names(zoos):
    with pytest.raises(UserError, match=r"torchvision and timm have no model 'mixr' \(similar: mixer\); or give a fac"):
        load_model("mixr")
    with pytest.raises(UserError, match=r"timm has no model 'resnet' \(similar: resnet9\)$"):
        load_model("timm:resnet")


@pytest.mark.parametrize("name", ["torchvision:resnet9", "timm:resnet9"])
def test_weights_that_cannot_be_downloaded(zoos, name):
    with pytest.raises(UserError, match=rf"making {name} failed: OSError: no network.*; give its weights with `check"):
        load_model(name, pretrained=True)


def test_packages_that_are_not_installed(uninstalled, monkeypatch):
    uninstalled("timm")
    with pytest.raises(UserError, match=r"the package timm is not installed; run: pip install timm$"):
        load_model("timm:resnet50")
    uninstalled("torchvision")
    with pytest.raises(UserError, match=r"torchvision is not installed; run: pip install torchvision$"):
        load_model("torchvision:resnet50")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'resnet50' is not a module:function, and torchvision and timm are not inst"):
        load_model("resnet50")


def test_torchvision_itself():
    pytest.importorskip("torchvision")
    model = load_model("squeezenet1_1").module
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 26
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
