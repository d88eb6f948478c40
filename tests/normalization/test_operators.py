"""The operators of the state: the form for devices, which never waits for the device, and what PyTorch expects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sn_fast
from sn_fast.normalization import certify as _certify  # noqa: F401 - registers the operators
from sn_fast.normalization import prepared
from sn_fast.normalization.parametrization import SpectralNorm
from sn_fast.normalization.state import State
from sn_fast.ops import refresh as operators
from sn_fast.ops.fingerprint import fingerprint, record_of
from sn_fast.reference.geometry import Geometry, decode

from .models import X, states, step, true_norms, unchanged

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full gradient": {"gradient": "full"},
    "three iterations": {"n_power_iterations": 3},
    "full gradient, three iterations": {"gradient": "full", "n_power_iterations": 3},
    "reshape": {"operator": "reshape"},
    "not reduced": {"reduce": False},
    "scale": {"mode": "scale"},
}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 3),
    )


def normalised(**options: Any) -> nn.Sequential:
    return sn_fast.apply_spectral_norm(network(), X[:1], **{"beta": 0.3, **options})


def members(model: nn.Module) -> list[SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, SpectralNorm)]


class Arguments:
    """What ``sn_fast::refresh`` is given for a whole model: copies of its state, and the weights themselves."""

    def __init__(self, model: nn.Module, *, hashed: bool) -> None:
        batch = [(m, m.raw) for m in members(model)]
        self.weights, *tensors = prepared.tensors_of(batch)
        self.us, self.vs, self.sigmas, self.groups, self.previous = ([t.clone() for t in part] for part in tensors)
        self.records = [record_of(w, hashed=hashed) for w in self.weights]
        self.geometry = [c for m in members(model) for c in m.code]
        self.n = members(model)[0].options.n_power_iterations
        self.changed = torch.zeros(len(batch), dtype=torch.bool)

    @property
    def state(self) -> list[Tensor]:
        return [*self.us, *self.vs, *self.sigmas, *self.groups, *self.previous]

    def list(self) -> list[Any]:
        state = (self.us, self.vs, self.sigmas, self.groups, self.previous)
        return [self.weights, *state, self.records, self.changed, self.geometry, self.n, "fp32", None]

    def of(self, i: int) -> list[Tensor]:
        """The state of one layer, its record too."""
        with_groups = [k for k, layer in enumerate(decode(self.geometry)) if layer.groups > 1]
        group = [self.groups[with_groups.index(i)]] if i in with_groups else []
        previous = [self.previous[i]] if self.previous else []
        return [self.us[i], self.vs[i], self.sigmas[i], self.records[i], *group, *previous]


class NoHost(TorchDispatchMode):
    """Refuses what makes a host wait for a device: values that the host reads, and shapes that depend on values."""

    _WAITS = (
        *("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::item", "aten::nonzero"),
        *("aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave.Tensor"),
        *("aten::allclose", "aten::bincount"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.seen.append(name)
        assert name not in self._WAITS, f"{name} waits for the device"
        assert not name.startswith("aten::index.") or not any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        ), "a mask as an index waits for the device"
        return func(*args, **kwargs or {})


def move(weights: list[Tensor], which: tuple[int, ...]) -> None:
    with torch.no_grad():
        for i in which:
            weights[i].add_(0.03 * weights[i].std() * torch.randn_like(weights[i]))  # a step, no replacement


# -- the form for devices ---------------------------------------------------------------------------------------------


def test_the_refusal_of_waiting_refuses() -> None:
    x = torch.ones(3)
    for waits in (lambda: bool(x.any()), lambda: float(x[0]), lambda: torch.equal(x, x), lambda: x[x > 0], x.nonzero):
        with NoHost(), pytest.raises(AssertionError, match="waits"):
            waits()


@pytest.mark.parametrize("which", [(), (0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("options", OPTIONS)
def test_state_moves_where_the_content_moved_and_as_on_the_host(which: tuple[int, ...], options: str) -> None:
    model = normalised(**OPTIONS[options])
    device, host = Arguments(model, hashed=True), Arguments(model, hashed=True)
    host.weights = device.weights  # of a reshaped kernel they are copies
    before = [[t.clone() for t in device.of(i)] for i in range(4)]
    move(device.weights, which)
    with NoHost() as mode:
        operators._refresh_on_device(*device.list())
    assert mode.seen.count("sn_fast::fingerprint") == 4
    assert device.changed.tolist() == [i in which for i in range(4)]
    for i in range(4):
        same = [torch.equal(a, b) for a, b in zip(device.of(i)[:4], before[i])]
        assert all(same) if i not in which else not any(same)
    for record, weight in zip(device.records, device.weights, strict=True):
        assert torch.equal(record, fingerprint(weight))
    operators._refresh_on_host(*host.list())
    assert torch.equal(host.changed, device.changed)
    for a, b in zip([*device.state, *device.records], [*host.state, *host.records], strict=True):
        assert torch.equal(a, b)
    again = [t.clone() for t in device.state]
    operators._refresh_on_device(*device.list())  # nothing has moved since
    assert not device.changed.any()
    assert all(map(torch.equal, device.state, again))


@pytest.mark.parametrize("change", ["one element", "a swap", "signs of a pair", "a transpose", "minus zero"])
def test_the_smallest_changes_of_content_move_the_state(change: str) -> None:
    model = sn_fast.apply_spectral_norm(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(1, 6), beta=0.3)
    if change == "minus zero":
        model[0].parametrizations.weight.original.data[2, 3] = 0.0
    arguments = Arguments(model, hashed=True)
    w = arguments.weights[0]
    if change == "one element":
        w[3, 4] = torch.nextafter(w[3, 4], torch.tensor(9.0))
    elif change == "a swap":
        w[[1, 2]] = w[[2, 1]]
    elif change == "signs of a pair":
        w[0, :2] *= -1
    elif change == "minus zero":
        w[2, 3] = -0.0
    else:
        w.copy_(w.T.clone())
    operators._refresh_on_device(*arguments.list())
    assert arguments.changed.tolist() == [True, False]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_weights_without_a_norm_keep_their_vectors_finite(value: float) -> None:
    model = normalised()
    arguments = Arguments(model, hashed=True)
    arguments.weights[0].fill_(value)
    operators._refresh_on_device(*arguments.list())
    assert arguments.changed.tolist() == [True, False, False, False]
    assert all(bool(t.isfinite().all()) for t in (*arguments.us, *arguments.vs))
    operators._refresh_on_device(*arguments.list())
    assert not arguments.changed.any()  # NaN is content as any other


def test_members_of_several_dtypes() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    model = nn.Sequential(*(sn_fast.spectral_norm(nn.Linear(5, 4).to(d)) for d in dtypes))
    device, host = Arguments(model, hashed=True), Arguments(model, hashed=True)
    host.weights = device.weights
    move(device.weights, (0, 1, 3))
    operators._refresh_on_device(*device.list())
    operators._refresh_on_host(*host.list())
    assert device.changed.tolist() == [True, True, False, True]
    assert all(map(torch.equal, device.state, host.state))


# -- the form for devices, in whole models ----------------------------------------------------------------------------


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Models on the CPU take the way of a device. Of every refresh by its operator: which weights had changed."""
    changed: list[list[bool]] = []
    form = operators._refresh_on_device

    def on_device(*args: Any) -> None:
        with NoHost():
            form(*args)
        changed.append(args[7].tolist())

    def has_moved(self: State, weight: Tensor) -> bool | None:
        return None if self.record is not None else True

    monkeypatch.setattr(State, "is_hashed_on", lambda self, device: True)
    monkeypatch.setattr(State, "has_moved", has_moved)
    monkeypatch.setattr(operators, "_refresh_on_host", on_device)  # the choice by "cpu" leads here
    return changed


@pytest.mark.parametrize("options", OPTIONS)
def test_training_as_on_a_device(as_on_a_device: list[list[bool]], options: str) -> None:
    model = normalised(**OPTIONS[options])
    assert all(m.record is not None and m.record.dtype == torch.int64 for m in members(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    as_on_a_device.clear()
    for _ in range(3):
        step(model, X, optimizer)
        model.eval()(X)
        model.train()
    # Forwards of training, then of evaluation: the first of all sees no change, and each step's is seen once.
    assert as_on_a_device == [[False] * 4, [True] * 4] + [[False] * 4, [True] * 4] * 2
    assert list(sn_fast.sigmas(model).values()) == pytest.approx(true_norms_of(model), rel=0.05)


def true_norms_of(model: nn.Module) -> list[float]:
    found = []
    for m in members(model):
        if m.as_matrix:
            matrix = m.operand(m.raw.detach())
            found.append(float(torch.linalg.matrix_norm(matrix, 2)))
        else:
            op = sn_fast.operator_of(m.module, m.layer_geometry.input_size, raw=True)
            found.append(float(sn_fast.operator_norm(op, method="dense").detach()))
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_a_device_and_the_host_train_alike(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """The same iterations from the same vectors: the same bits, where no weight is replaced."""
    start = normalised(**OPTIONS[options])

    def train() -> list[Tensor]:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses = [step(model, X, optimizer) for _ in range(4)]
        model(X)
        return [*losses, *(p.detach() for p in model.parameters()), *states(model)]

    on_host = train()
    with monkeypatch.context() as patch:
        patch.setattr(State, "is_hashed_on", lambda self, device: True)
        patch.setattr(State, "has_moved", lambda self, weight: None if self.record is not None else True)
        patch.setattr(operators, "_refresh_on_host", operators._refresh_on_device)
        for m in members(start):
            m.record = record_of(m.operand(m.raw), hashed=True)
        on_device = train()
    assert len(on_device) == len(on_host)
    assert all(map(torch.equal, on_device, on_host))


@pytest.mark.parametrize("part", [0, 2, 6])
def test_one_layer_moves_as_on_a_device(as_on_a_device: list[list[bool]], part: int) -> None:
    model = normalised()
    as_on_a_device.clear()
    before = {id(m): [b.clone() for b in m.buffers()] for m in members(model)}
    model[part].parametrizations.weight.original.data.mul_(1.01)
    out = model(X)
    assert as_on_a_device == [[m.module is model[part] for m in members(model)]]
    for m in members(model):
        assert (m.module is not model[part]) == all(map(torch.equal, m.buffers(), before[id(m)]))
    out.sum().backward()
    assert torch.equal(model(X), out)


def test_two_forwards_and_one_backward_as_on_a_device(as_on_a_device: list[list[bool]]) -> None:
    model = normalised()
    model(X).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(X).square().sum()
    weights = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data = 1.1 * p.data
    model(X)
    for p, w in zip(model.parameters(), weights, strict=True):
        p.data = w
    loss.backward()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], wanted))


def test_a_bound_as_on_a_device(as_on_a_device: list[list[bool]]) -> None:
    """Certified where the weight has changed, and there alone."""
    model = normalised(bound=True)
    model(X)
    model[0].parametrizations.weight.original.data.mul_(1.5)
    before = states(model)
    model(X)
    assert as_on_a_device[-1] == [True, False, False, False]
    assert sum(not torch.equal(a, b) for a, b in zip(states(model), before, strict=True)) <= 4
    for sigma, exact in zip(sn_fast.sigmas(model).values(), true_norms_of(model), strict=True):
        assert sigma >= exact
    assert max(true_norms(model, raw=False)) <= 0.3
    assert not unchanged(model, before)


# -- what PyTorch expects of operators --------------------------------------------------------------------------------


def small(**options: Any) -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2)
    return sn_fast.apply_spectral_norm(nn.Sequential(*layers), torch.randn(1, 2, 4, 4), **options)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("options", "moved"), [("plain", (0,)), ("full gradient, three iterations", (0, 1))])
def test_opcheck_of_refresh_and_update(options: str, hashed: bool, moved: tuple[int, ...]) -> None:
    arguments = Arguments(small(**OPTIONS[options]), hashed=hashed)
    move(arguments.weights, moved)
    fresh = [torch.empty_like(t) for t in (*arguments.sigmas, *arguments.us, *arguments.vs, *arguments.groups)]
    fresh = [*fresh, *map(torch.empty_like, arguments.previous)] if arguments.previous else fresh[:2]
    state = (arguments.us, arguments.vs, arguments.sigmas, arguments.groups, arguments.previous, arguments.records)
    rest = (arguments.geometry, arguments.n, "fp32")
    given = (arguments.weights, *state)
    torch.library.opcheck(torch.ops.sn_fast.refresh.default, (*given, fresh, arguments.changed, *rest))
    torch.library.opcheck(torch.ops.sn_fast.update.default, (*given, *rest))


def test_opcheck_of_singular_vectors() -> None:
    a = Arguments(small(), hashed=False)
    torch.library.opcheck(torch.ops.sn_fast.singular_vectors.default, (a.weights, a.us, a.vs, a.geometry, "fp32"))
    zeros = [[torch.zeros_like(x) for x in xs] for xs in (a.us, a.vs)]
    torch.library.opcheck(torch.ops.sn_fast.singular_vectors.default, (a.weights, *zeros, a.geometry, "fp32"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (5, 7), (1,), (0, 4), (40, 40)])
def test_opcheck_of_fingerprint(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).to(dtype)
    torch.library.opcheck(torch.ops.sn_fast.fingerprint.default, (weight,))
    torch.library.opcheck(torch.ops.sn_fast.fingerprint.default, (weight.transpose(0, -1),))


@pytest.mark.parametrize("changed", [[False, True], [True, False]])
@pytest.mark.parametrize("every_size", [False, True])
def test_opcheck_of_certify(changed: list[bool], every_size: bool) -> None:
    layer = sn_fast.spectral_norm(nn.Conv2d(2, 3, 3, padding=1), input_size="any" if every_size else (5, 5), bound=True)
    (m,) = members(layer)
    weight, sigma = m.raw.detach(), torch.tensor(7.0)
    arguments = (weight, sigma, torch.empty(()), torch.tensor(changed), 1, m.bound_code, every_size)
    torch.library.opcheck(torch.ops.sn_fast.certify.default, arguments)
    torch.library.opcheck(torch.ops.sn_fast.certified_norm.default, (weight, m.bound_code, every_size))
    torch.ops.sn_fast.certify.default(*arguments)
    expected = m.sigma if changed[1] else torch.tensor(7.0)
    assert torch.equal(arguments[2], sigma)
    assert torch.equal(sigma, expected)


def test_opcheck_of_certified_norm_of_a_matrix() -> None:
    code = Geometry().encode()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.library.opcheck(torch.ops.sn_fast.certified_norm.default, (torch.randn(4, 6).to(dtype), code, False))
