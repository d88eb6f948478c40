"""Forwards and updates of one model on several streams of a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import sn_fast

from ..normalization.models import X
from ..on_device import DEVICE
from .whole_models import layers, normalised

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(DEVICE.type != "cuda", reason="streams are a GPU's"),
]
_LONG = 100_000_000  # clock cycles: about 50 ms


def test_a_forward_waits_for_an_update_on_another_stream() -> None:
    model = normalised()
    for m in layers(model):
        m.u.copy_(torch.nn.functional.normalize(torch.randn_like(m.u).flatten(), dim=0).view_as(m.u))
        m.v.copy_(torch.nn.functional.normalize(torch.randn_like(m.v).flatten(), dim=0).view_as(m.v))
    twin = copy.deepcopy(model)
    model(X), twin(X)
    sn_fast.update_spectral_norm(twin, 3)
    expected = twin(X)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(_LONG)
        sn_fast.update_spectral_norm(model, 3)
    with torch.cuda.stream(second):
        found = model(X)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_streams_that_take_turns_while_the_weights_move() -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    model(X), twin(X)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results, expected = [], []
    for i in range(12):
        torch.cuda.synchronize()
        for net in (model, twin):
            for k, m in enumerate(layers(net)):
                g = torch.Generator().manual_seed(100 * i + k)
                m.raw.data.add_(0.01 * torch.randn(m.raw.shape, generator=g).to(m.raw.device))
        torch.cuda.synchronize()
        expected += [twin(X), twin(X)]
        torch.cuda.synchronize()
        for stream in (streams[i % 3], streams[(i + 1) % 3]):
            with torch.cuda.stream(stream):
                results.append(model(X))
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))
