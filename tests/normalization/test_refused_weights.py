"""Weights without a spectral norm are refused in one line that names the remedy."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

import sn_fast

from .torch_cases import (  # noqa: F401 - swap is a fixture of every test
    PLACES,
    Mask,
    assert_true,
    buffers,
    matrix,
    normalised,
    same,
    spectral_norm,
    state_of,
    swap,
    trained,
    truth,
)

# -- weights without such a norm --------------------------------------------------------------------------------------


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("layer", "name", "says"),
    [
        (lambda: nn.Linear(3, 4), "bias", r"Linear\.bias .*weight has shape \(4,\)"),
        (lambda: nn.PReLU(), "weight", r"PReLU\.weight .*weight has shape \(1,\)"),
        (lambda: nn.BatchNorm2d(3), "weight", r"BatchNorm2d\.weight .*weight has shape \(3,\)"),
        (Scalar, "weight", r"Scalar\.weight .*weight has shape \(\)"),
    ],
)
@pytest.mark.parametrize("operator", ["conv", "reshape"])
def test_weights_of_fewer_than_two_axes_are_refused(layer, name: str, says: str, operator: str) -> None:
    module = layer()
    with pytest.raises(ValueError, match=says) as raised:
        sn_fast.spectral_norm(module, name, mode="scale", operator=operator)
    message = str(raised.value)
    assert "\n" not in message
    assert "name=" in message
    assert "leave" in message
    assert not parametrize.is_parametrized(module)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("operator", ["conv", "reshape"])
@pytest.mark.parametrize("make", [lambda d: nn.Linear(3, 4, dtype=d), lambda d: nn.Conv2d(3, 4, 3, dtype=d)])
def test_complex_weights_are_refused(make, dtype: torch.dtype, operator: str) -> None:
    module = make(dtype)
    with pytest.raises(TypeError, match=rf"{type(module).__name__}\.weight .*weight has dtype {dtype};") as raised:
        sn_fast.spectral_norm(module, mode="scale", operator=operator)
    message = str(raised.value)
    assert "\n" not in message
    assert "torch.nn.utils.parametrizations.spectral_norm" in message
    assert not parametrize.is_parametrized(module)
    theirs.spectral_norm(module)  # what the message names takes it


def test_a_whole_model_names_the_layer_that_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
    with pytest.raises(ValueError, match=r"layer '1': PReLU\.weight .*weight has shape \(1,\)"):
        sn_fast.apply_spectral_norm(model, torch.randn(1, 3), include=(nn.Linear, nn.PReLU), operator="reshape")
    assert not any(map(parametrize.is_parametrized, model.modules()))
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.cfloat))
    with pytest.raises(TypeError, match=r"layer '0': Linear\.weight .*has dtype torch\.complex64"):
        sn_fast.apply_spectral_norm(model, torch.randn(1, 3, dtype=torch.cfloat))
