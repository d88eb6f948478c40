"""pgd(cuda_graph=True). Without a GPU the capture is stood in for by running the loop again on the same memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import graph, methods, pgd

from ..on_device import DEVICE

OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {"norm": 2},
    "inf, clip": {"norm": "inf", "clip": (0.0, 1.0)},
    "per sample": {"norm": 2, "eps": torch.tensor([0.1, 0.2, 0.3, 0.4]), "alpha": torch.tensor([0.1, 0.1, 0.0, 0.2])},
    "predicted labels": {"y": None, "random_start": True},
    "restarts": {"random_start": True, "restarts": 3, "keep_best": True, "return_info": True},
    "early stop": {"early_stop": True, "targeted": True, "return_info": True},
    "normalised input": {"mean": (0.5, 0.4), "std": (0.2, 0.3), "norm": "L1-exact"},
    "training mode": {"model_mode": "train", "freeze_sn": False},
}

Loop = Callable[[], graph.Tensors]
Capture = Callable[[Loop], tuple[Callable[[], None], graph.Tensors]]
ON_GPU = DEVICE.type == "cuda"


class Counting(nn.Module):
    """Counts its calls in a buffer, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Captures:
    """Counts captures and their replays."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.count = 0
        self.replays = 0
        self.unaware: tuple[Tensor, ...] = ()  # written without being told, as by a graph

    def __call__(self, loop: Loop) -> tuple[Callable[[], None], graph.Tensors]:
        self.count += 1
        replay, results = self._capture(loop)

        def counted() -> None:
            self.replays += 1
            with torch.autograd._unsafe_preserve_version_counter(self.unaware):
                replay()

        return counted, results


def stand_in(loop: Loop) -> tuple[Callable[[], None], graph.Tensors]:
    """For CUDA's capture: the loop is run again on the same memory, its results written in place."""
    results = loop()

    def replay() -> None:
        for mine, new in zip(results, loop()):
            if mine is not None and new is not None:
                mine.copy_(new)

    return replay, results


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Without a GPU cuda_graph=True runs where the tensors are."""
    counted = Captures(graph.capture if ON_GPU else stand_in)
    monkeypatch.setattr(graph, "capture", counted)
    if not ON_GPU:
        monkeypatch.setattr(graph, "on_side_stream", lambda function: function())
        monkeypatch.setattr(methods, "_check_graph", lambda model, x: None)
    return counted


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ELU(), nn.Flatten(), nn.Linear(4 * 25, 3)
    )
    return sn_fast.apply_spectral_norm(model, torch.randn(1, 2, 5, 5), beta=0.7)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 2, 5, 5, generator=generator), torch.randint(3, (4,), generator=generator)


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = batch(100)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def attack(model: nn.Module, seed: int, options: dict[str, Any], cuda_graph: bool) -> tuple[Any, ...]:
    x, y = batch(seed)
    arguments = {"y": y, "eps": 0.4, "steps": 3} | options
    generator = torch.Generator().manual_seed(seed)
    result = pgd(model, x, **arguments, cuda_graph=cuda_graph, generator=generator)
    if not isinstance(result, tuple):
        return (result,)
    x_adv, info = result
    return x_adv, info.loss, info.success, info.y, info.gradients


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_ordinary_loop(captures: Captures, name: str) -> None:
    """Also with other samples, and after the weights have moved: bit for bit, and without a new capture."""
    model, options = network(), OPTIONS[name]
    for call, seed in enumerate((0, 1, 1, 2)):
        if call == 2:
            train(model)
        expected = attack(model, seed, options, cuda_graph=False)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        actual = attack(model, seed, options, cuda_graph=True)
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), key
    assert (captures.count, captures.replays) == (1, 3)


def test_buffers_written_in_eval_mode_are_put_back(captures: Captures) -> None:
    model = nn.Sequential(Counting(), network())
    captures.unaware = (model[0].calls,)
    for seed in range(3):
        attack(model, seed, {}, True)
        assert model[0].calls == 0
    assert captures.replays == 2


def test_every_stream_has_its_own_graph(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams that share a graph's memory would write over each other's batches."""
    model, stream = network(), graph.stream_of
    attack(model, 0, {}, True)
    monkeypatch.setattr(graph, "stream_of", lambda device: (1234, 0))
    attack(model, 0, {}, True)
    monkeypatch.setattr(graph, "stream_of", stream)
    attack(model, 0, {}, True)
    assert (captures.count, captures.replays) == (2, 1)


def test_results_belong_to_the_caller(captures: Captures) -> None:
    model = network()
    first = attack(model, 0, {}, True)[0]
    kept = first.clone()
    second = attack(model, 1, {}, True)[0]
    kept_second = second.clone()
    attack(model, 2, {}, True)
    assert torch.equal(first, kept)
    assert torch.equal(second, kept_second)


def test_what_changes_the_work_is_captured_anew(captures: Captures) -> None:
    model = network()
    changes: list[Callable[[], Any]] = [
        lambda: attack(model, 0, {}, True),
        lambda: attack(model, 0, {"steps": 4}, True),
        lambda: attack(model, 0, {"eps": 0.3}, True),
        lambda: attack(model, 0, {"model_mode": "train"}, True),
        lambda: pgd(model, batch(0)[0][:2], batch(0)[1][:2], eps=0.4, steps=3, cuda_graph=True),
    ]
    for count, change in enumerate(changes, start=1):
        change()
        assert captures.count == count
        change()
        assert captures.count == count
    weight = model[4].parametrizations.weight.original
    weight.data = weight.data.clone()  # other memory: the old graph would read what is gone
    changes[-1]()
    assert captures.count == len(changes) + 1


def test_few_graphs_are_kept_and_none_keeps_the_model(captures: Captures) -> None:
    model = network()
    for steps in range(1, 8):
        attack(model, 0, {"steps": steps}, True)
    assert len(graph._graphs[model]) == graph._MOST_GRAPHS
    reference = weakref.ref(model)
    if not ON_GPU:
        graph._graphs[model].clear()  # the stand-in's replay holds the loop, and with it the model
    del model
    gc.collect()
    assert reference() is None


def test_sigma_is_refreshed_outside_the_graph(captures: Captures) -> None:
    """Once after the weight has moved, as without a graph."""
    model = network()
    attack(model, 0, {}, True)
    train(model)
    before = model[0].parametrizations.weight[0].sigma.clone()
    attack(model, 0, {}, True)
    once = model[0].parametrizations.weight[0].sigma.clone()
    attack(model, 0, {}, True)
    assert not torch.equal(once, before)
    assert torch.equal(model[0].parametrizations.weight[0].sigma, once)


def test_bad_input() -> None:
    x, y = batch(0)
    with pytest.raises(TypeError, match=r"cuda_graph=True needs a torch.nn.Module, got function"):
        pgd(lambda x: x.flatten(1), x, y, eps=0.1, cuda_graph=True)
    with pytest.raises(ValueError, match=r"cuda_graph=True needs x on a CUDA device, got cpu; use cuda_graph=False"):
        pgd(network().cpu(), x.cpu(), y.cpu(), eps=0.1, cuda_graph=True)
