"""What is done once for a model costs in proportion to its layers: counted in calls, not in seconds."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import sn_fast


def calls_of(function: Callable[[], object]) -> int:
    """How many functions, of Python and of C, a call runs through.

    Without ``startswith``: torch's own load_state_dict filters all names for every child.
    """
    n = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n
        n += event == "call" or (event == "c_call" and getattr(argument, "__name__", "") != "startswith")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n


def layers(n: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(n)])


def made(n: int) -> nn.Sequential:
    return sn_fast.apply_spectral_norm(layers(n), torch.randn(1, 4))


def trained(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.data.mul_(1.01)
    return model


WAYS: dict[str, Callable[[int], Callable[[], object]]] = {
    "apply_spectral_norm": lambda n: partial(sn_fast.apply_spectral_norm, layers(n), torch.randn(1, 4)),
    "state_dict": lambda n: made(n).state_dict,
    "state_dict, after a step": lambda n: trained(made(n)).state_dict,
    "load_state_dict": lambda n: partial(made(n).load_state_dict, made(n).state_dict()),
    "deepcopy": lambda n: partial(copy.deepcopy, made(n)),
    "deepcopy, after a step": lambda n: partial(copy.deepcopy, trained(made(n))),
    "forward": lambda n: partial(trained(made(n)), torch.randn(1, 4)),
    "update_spectral_norm": lambda n: partial(sn_fast.update_spectral_norm, made(n)),
    "sigmas": lambda n: partial(sn_fast.sigmas, trained(made(n))),
    "double": lambda n: made(n).double,
    "remove_spectral_norm": lambda n: partial(sn_fast.remove_spectral_norm, made(n)),
}


@pytest.mark.parametrize("way", WAYS)
def test_calls_grow_with_the_layers(way: str) -> None:
    WAYS[way](4)()  # what is found once for all
    few, many = (calls_of(WAYS[way](n)) for n in (6, 24))
    assert many > 2 * few  # each layer does count
    assert many < 4.1 * few
