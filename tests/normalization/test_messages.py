"""What a user reads who gives something else, or normalises twice: the remedy, as code that runs."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sn_fast

from ..on_device import DEVICE

X = torch.zeros(1, 3, 8, 8, device=DEVICE)


def network() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(256, 2)).to(DEVICE)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), X.shape, [1, 3, 8, 8]])
@pytest.mark.parametrize("function", [sn_fast.apply_spectral_norm, sn_fast.lipschitz_bound])
def test_a_shape_in_place_of_an_input(function: Callable[..., Any], shape: Any) -> None:
    with pytest.raises(
        TypeError, match=r"example_input=\(1, 3, 8, 8\) is a shape; give a tensor, e\.g\. (.*)$"
    ) as caught:
        function(network(), shape)
    example = eval(str(caught.value).partition("e.g. ")[2])
    assert torch.equal(example, torch.zeros(1, 3, 8, 8))


def test_other_examples_that_are_none() -> None:
    for example in ([X], "x", 3, None):
        with pytest.raises(TypeError, match=rf"example_input is a {type(example).__name__}; give a tensor, a tuple"):
            sn_fast.apply_spectral_norm(network(), example)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional argument"):  # a tuple of arguments, as many as it may be
        sn_fast.apply_spectral_norm(network(), (X, 3))


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "torch's": lambda layer: parametrizations.spectral_norm(layer),
    "torch's older": lambda layer: nn.utils.spectral_norm(layer),
    "weight_norm, older": lambda layer: nn.utils.weight_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "sn_fast's": lambda layer: sn_fast.spectral_norm(layer, input_size=(8, 8)),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_others_compute_comes_with_the_call_that_ends_that(other: str, whole: bool) -> None:
    model = network()
    layer = model[0][2]  # type: ignore[index]
    OTHERS[other](layer)
    with torch.no_grad():
        before = model.train()(X + 1)

    def normalise() -> Tensor:
        if whole:
            sn_fast.apply_spectral_norm(model, X, beta=float("inf"))
        else:
            sn_fast.spectral_norm(layer, input_size=(8, 8), beta=float("inf"))
        result: Tensor = model.eval()(X + 1)
        return result

    with pytest.raises(ValueError, match=r"first, with [a-z_.]+\(.*\)$") as caught:
        normalise()
    if whole:
        assert str(caught.value).startswith("layer '0.2': Conv2d.weight is ")
    (call,) = re.findall(r"first, with (.*)$", str(caught.value))
    eval(call, {"torch": torch, "sn_fast": sn_fast, "model": model, "module": layer})
    assert torch.allclose(normalise().detach(), before, atol=1e-3)


def test_the_warning_at_a_larger_size_names_layer_and_line() -> None:
    model = sn_fast.apply_spectral_norm(network(), X, exclude="^2$")
    larger = torch.zeros(1, 3, 12, 12, device=DEVICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
            model[0](larger)
    assert [re.search(r"layer '(.*)' \(Conv2d\)", str(w.message))[1] for w in caught] == ["0.0", "0.2"]  # type: ignore[index]
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line)}


def test_a_single_layer_has_no_path() -> None:
    layer = sn_fast.spectral_norm(nn.Conv2d(3, 4, 3).to(DEVICE), input_size=(8, 8))
    with pytest.warns(UserWarning, match=r"^sn_fast: Conv2d was normalised for inputs of size \(8, 8\)") as caught:
        layer(torch.zeros(1, 3, 12, 12, device=DEVICE))
    assert caught[0].filename == __file__
