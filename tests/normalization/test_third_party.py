"""Optimizers and offloading of other packages: the norms in use are as near to 1 as with torch's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

import sn_fast

pytestmark = pytest.mark.slow


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return sn_fast.apply_spectral_norm(net, torch.randn(1, 64), mode="scale")


def distance(make: Callable) -> float:
    """The largest distance from 1 of a norm in use after training."""
    model = network()
    optimizer, before = make(model.parameters()), sn_fast.sigmas(model)
    for _ in range(60):
        x = torch.randn(32, 64)
        (model(x) - 3 * x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(x)
    assert sn_fast.sigmas(model) != before
    return max(abs(float(torch.linalg.matrix_norm(model[i].weight.detach(), 2)) - 1) for i in (0, 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("prodigyopt", lambda m, p: m.Prodigy(p, lr=1.0)),
        ("madgrad", lambda m, p: m.MADGRAD(p, lr=1e-3)),
        ("bitsandbytes", lambda m, p: m.optim.Adam8bit(p, lr=1e-2)),
        ("torch_optimizer", lambda m, p: m.RAdam(p, lr=1e-2)),
        ("torch_optimizer", lambda m, p: m.Yogi(p, lr=1e-2)),
        ("torch_optimizer", lambda m, p: m.AdaBound(p, lr=1e-2)),
    ],
)
def test_optimizers(package: str, make: Callable) -> None:
    pytest.importorskip(package, exc_type=ImportError)
    module = importlib.import_module(package)
    own = distance(lambda p: torch.optim.Adam(p, 1e-2))
    assert distance(lambda p: make(module, p)) <= 2 * own + 0.02


def _offloaded(how: str, model: nn.Module, folder) -> nn.Module:
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    return accelerate.disk_offload(model, str(folder), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_offloaded_models(how: str, tmp_path) -> None:
    model, x = network().eval(), torch.randn(4, 64)
    with torch.no_grad():
        expected = model(x)
        offloaded = _offloaded(how, model, tmp_path)
        for _ in range(2):
            torch.testing.assert_close(offloaded(x), expected, rtol=1e-3, atol=1e-5)


def test_empty_weights_then_loaded() -> None:
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    stored = network()
    with accelerate.init_empty_weights():
        model = network()
    model.load_state_dict(stored.state_dict(), assign=True)
    x = torch.randn(4, 64)
    torch.testing.assert_close(model(x), stored(x))
    assert float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)) == pytest.approx(1.0, rel=6e-3)
