"""Layers whose code, hooks or statistics are not those of their class: what they compute is bounded, or nothing is."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_base
from torch.nn.utils import prune

from sn_fast.layers.exact import why_not_its_class
from sn_fast.lipschitz import lipschitz_bound

from .truth import bound_of, jacobian_norm, report_of

pytestmark = pytest.mark.usefixtures("rules_alone")


@pytest.fixture(autouse=True)
def _fixed() -> None:
    torch.manual_seed(0)


def linear() -> nn.Linear:
    return nn.Linear(4, 4).double()


def replaced_forward() -> nn.Module:
    layer = linear()
    layer.forward = types.MethodType(lambda self, x: 5 * F.linear(x, self.weight), layer)
    return layer


def replaced_helper() -> nn.Module:
    layer = nn.Conv1d(1, 2, 3).double()
    layer._conv_forward = lambda x, w, b: F.conv1d(x, 7 * w, b)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), layer)


def subclass_call() -> nn.Module:
    class Louder(nn.ReLU):
        def __call__(self, x: Tensor) -> Tensor:
            return 5 * super().__call__(x)

    return nn.Sequential(Louder())


def mixed_in_call() -> nn.Module:
    class Louder(nn.Module):
        def __call__(self, x: Tensor) -> Tensor:
            return 5 * super().__call__(x)

    return nn.Sequential(type("LoudLinear", (nn.Linear, Louder), {})(4, 4).double())


def container() -> nn.Module:
    model = nn.Sequential(nn.ReLU())
    model.forward = lambda x: 5 * x
    return model


def looks_like_a_wrapper() -> nn.Module:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return 5 * self._orig_mod(x)

    return Wrapper()


def hooked_container() -> nn.Module:
    model = nn.Sequential(linear())
    model.register_forward_hook(lambda module, args, out: 3 * out)
    return model


def hooked_wrapper() -> nn.Module:
    model = nn.DataParallel(nn.Sequential(linear()))
    model.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    return model


OTHER_CODE = [
    *(replaced_forward, lambda: nn.Sequential(replaced_forward(), nn.Identity()), replaced_helper, subclass_call),
    *(mixed_in_call, container, looks_like_a_wrapper, hooked_container, hooked_wrapper),
]


@pytest.mark.parametrize("make", OTHER_CODE)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_other_code_is_traced_through(make: Callable[[], nn.Module], scale: float) -> None:
    model = make().eval()
    x = torch.randn(1, 4, dtype=torch.float64)
    inner = model.module if isinstance(model, nn.DataParallel) else model
    truth = jacobian_norm(inner, x.abs()) * (3 if isinstance(model, nn.DataParallel) else 1)
    bound = bound_of(model, scale * x)
    assert truth * (1 - 1e-9) <= bound <= truth * 2


@pytest.fixture
def patched(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    original = nn.Linear.forward
    nn.Linear.forward = lambda self, x: 5 * original(self, x)  # type: ignore[method-assign]
    try:
        yield linear()
    finally:
        nn.Linear.forward = original  # type: ignore[method-assign]


def test_a_class_that_was_patched(patched: nn.Module) -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    assert bound_of(nn.Sequential(patched), x) >= jacobian_norm(patched, x) * (1 - 1e-9)


def own_statistics() -> list[nn.Module]:
    off, batch, training = nn.InstanceNorm1d(2, track_running_stats=True), nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    off.track_running_stats = False
    batch.running_mean = batch.running_var = None
    training.train = types.MethodType(lambda self, mode=True: self, training)  # stays in training mode
    forced = nn.BatchNorm1d(2)
    forced.forward = lambda x: F.batch_norm(x, None, None, forced.weight, forced.bias, True)
    return [off, batch, training, forced, nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2)]


@pytest.mark.parametrize("i", range(6))
@pytest.mark.parametrize("before", [[], [nn.Conv1d(2, 2, 1)]])
def test_statistics_of_the_input(i: int, before: list[nn.Module]) -> None:
    report = report_of(nn.Sequential(*before, own_statistics()[i]), torch.randn(1, 2, 3))
    assert math.isinf(report.bound)
    assert "deviation of its own input" in report.reason


def test_running_statistics_kept_without_tracking_are_used() -> None:
    norm = nn.BatchNorm1d(4).double()
    norm.running_var.fill_(0.25)
    norm.track_running_stats = False
    assert bound_of(norm, torch.zeros(1, 4, dtype=torch.float64)) == pytest.approx(2.0, rel=1e-4)


def writes_data(module: nn.Module, args: Any, out: Tensor) -> None:
    out.data.mul_(7)


def writes_if_large(module: nn.Module, args: Any, out: Tensor) -> None:
    if float(out.norm()) > 10:
        out.mul_(7)


def scales_input(module: nn.Module, args: Any) -> None:
    args[0].data.mul_(7)


def scales_weight(module: nn.Module, args: Any) -> None:
    module.weight.data.mul_(7)


ALTERING: list[Callable[..., Any]] = [
    lambda module, args, out: 7 * out,
    lambda module, args, out: out.mul_(7) * 1,
    lambda module, args, out: None if out.norm().item() < 10 else 7 * out,
    lambda module, args, out: out.clone(),
    writes_data,
    writes_if_large,
]


@pytest.mark.parametrize("hook", ALTERING)
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_that_may_alter_the_output(hook: Callable[..., Any], everywhere: bool) -> None:
    layer = nn.ReLU()
    only = lambda m, a, o: hook(m, a, o) if isinstance(m, nn.ReLU) else None  # noqa: E731
    handle = module_base.register_module_forward_hook(only) if everywhere else layer.register_forward_hook(hook)
    try:
        report = report_of(nn.Sequential(layer), torch.zeros(1, 4))
    finally:
        handle.remove()
    assert math.isinf(report.bound)
    assert "hook" in report.reason


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args: (7 * args[0],),
        lambda module, args: None if float(args[0].norm()) < 10 else (7 * args[0],),
        scales_input,
        scales_weight,
    ],
)
def test_pre_hooks_that_may_alter_input_or_weight(hook: Callable[..., Any]) -> None:
    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(hook)
    report = report_of(nn.Sequential(layer), torch.zeros(1, 4))
    assert math.isinf(report.bound)
    assert "hook" in report.reason


def test_hooks_that_look_on_cost_nothing() -> None:
    layer, seen = linear(), []
    plain = bound_of(layer, torch.zeros(1, 4, dtype=torch.float64))
    layer.register_forward_hook(lambda module, args, out: seen.append(out.detach().cpu().numpy()))
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args), with_kwargs=True)
    assert bound_of(layer, torch.zeros(1, 4, dtype=torch.float64)) == plain
    assert len(seen) == 4  # of the graph, and of the model that it is compared with
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1


def test_hooks_of_pytorch_that_recompute_the_weight() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    for layer in (nn.utils.weight_norm(linear()), nn.utils.spectral_norm(linear())):
        layer.eval()
        assert why_not_its_class(layer) is None
        truth = jacobian_norm(layer, x)
        assert truth * (1 - 1e-9) <= bound_of(nn.Sequential(layer), x) <= 1.02 * truth
    pruned = linear()
    prune.l1_unstructured(pruned, "weight", 6)
    assert bound_of(nn.Sequential(pruned), x) == pytest.approx(jacobian_norm(pruned, x), rel=2e-2)


def test_an_output_size_that_the_layer_was_not_made_for() -> None:
    layer = nn.ConvTranspose1d(1, 1, 3, 2)
    model = nn.Module()
    model.layer = layer
    model.forward = lambda x: model.layer(x, output_size=[14])
    report = lipschitz_bound(model, torch.zeros(1, 1, 6))
    assert math.isinf(report.bound)
    assert "output of size (14,)" in report.reason


def test_a_model_that_does_not_leave_training_mode_is_random() -> None:
    model = nn.Sequential(nn.Dropout())
    model[0].train = types.MethodType(lambda self, mode=True: self, model[0])
    assert "random" in lipschitz_bound(model.train(), torch.ones(1, 4)).reason
