"""That the operators are right on this GPU: values, opcheck, graphs, streams, and the same bits on every repeat."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from benchmarks import models
from benchmarks.gpu_check.roofline import layers, power_arguments, used_weights
from benchmarks.gpu_check.timing import Timer
from sn_fast.attacks import pgd_step

from .cases import Case, all_cases, kernel_names, tensors
from .conftest import REHEARSED

_FEW = ("float32 weights, fp32", "float32, on chip", "float32, 3x3")
on_a_gpu_only = pytest.mark.skipif(REHEARSED, reason="there is nothing to see of it on the emulator")


@pytest.fixture(scope="module")
def cases(device: str) -> list[Case]:
    made = all_cases(device, small=REHEARSED)
    return [c for c in made if c.name.endswith(_FEW)] if REHEARSED else made


@pytest.fixture
def model(device: str) -> nn.Module:
    network = next(iter((models.TINY if REHEARSED else models.NETWORKS).values()))
    return sn_fast.apply_spectral_norm(network.make().to(device), network.example().to(device))


def test_values_against_float64(cases: Sequence[Case]) -> None:
    """With NaN in all new memory: an element that nothing wrote is an error, whatever was there."""
    with _poisoned_memory():
        errors = {case.name: (case.error(case.run()), case.tolerance) for case in cases}
    assert {name: found for name, found in errors.items() if not found[0] <= found[1]} == {}
    assert len(errors) >= (10 if REHEARSED else 100)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty fills what it returns
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_kernel_names_are_found() -> None:
    """Runs everywhere: the list that the next test goes by is read from the sources."""
    assert {"power_step_half", "lanczos_combine", "fingerprint_weights"} <= {
        n.removesuffix("_kernel") for n in kernel_names()
    }


@on_a_gpu_only
def test_every_kernel_is_started(cases: Sequence[Case]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for case in cases:
            case.run()
        torch.cuda.synchronize()
    started = " ".join(event.key for event in profile.key_averages())
    assert [name for name in sorted(kernel_names()) if name not in started] == []


def test_the_same_bits_on_every_repeat(cases: Sequence[Case], device: str) -> None:
    """The calls follow one another in a graph, and differences are counted on the device."""
    rounds, calls = (2, 1) if REHEARSED else (1000, 10)
    timer, different = Timer(device, 1), {}
    for case in (c for c in cases if "float32" in c.name):
        first = [t.clone() for t in case.run()]
        count = different[case.name] = torch.zeros((), dtype=torch.int64, device=device)

        def compare(case: Case = case, first: Sequence[Tensor] = first, count: Tensor = count) -> None:
            for a, b in zip(case.run(), first, strict=True):
                count.add_((a != b).any())

        replay = timer.graph(compare, calls)
        for _ in range(rounds):
            replay()
    assert {name: int(count) for name, count in different.items() if int(count)} == {}
    assert different


def test_opcheck(cases: Sequence[Case]) -> None:
    checked = [case for case in cases if case.opcheck]
    for case in checked[:2] if REHEARSED else checked:
        torch.library.opcheck(case.op, case.args)
    assert checked


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_a_graph_of_update_advances_the_state_as_eager_calls_do(model: nn.Module, device: str) -> None:
    twin = copy.deepcopy(model)
    replay = Timer(device, 1).graph(lambda: sn_fast.update_spectral_norm(model))
    # Capturing ran the update a few times: start both from the same state.
    for a, b in zip(layers(model), layers(twin), strict=True):
        a.state.u.copy_(b.state.u)
        a.state.v.copy_(b.state.v)
    for _ in range(3):
        replay()
        sn_fast.update_spectral_norm(twin)
    found, wanted = ([t for x in layers(m) for t in (x.state.u, x.state.v, x.state.sigma)] for m in (model, twin))
    assert all(map(torch.equal, found, wanted))


def test_a_graph_of_normalised_weights_and_their_gradients(model: nn.Module, device: str) -> None:
    raws = [x.state.raw for x in layers(model)]
    grads = [torch.randn_like(r) for r in raws]
    results: list[list[Tensor]] = []

    def forward_backward() -> None:
        weights = used_weights(model, (x.module for x in layers(model)))
        results[:] = [[w.detach() for w in weights], list(torch.autograd.grad(weights, raws, grads))]

    forward_backward()
    eager = [t.clone() for part in results for t in part]
    replay = Timer(device, 1).graph(forward_backward)
    for t in (t for part in results for t in part):  # the graph's own: it writes them anew
        t.zero_()
    replay()
    assert all(torch.equal(t, wanted) for t, wanted in zip((t for part in results for t in part), eager, strict=True))


@pytest.mark.parametrize("norm", ["inf", 2, 1, "L1-exact"])
def test_a_graph_of_pgd_step_takes_new_inputs(norm: Any, device: str) -> None:
    x_adv, x, grad = torch.rand(3, 4, 3, *((8, 8) if REHEARSED else (224, 224)), device=device)
    result: list[Tensor] = []

    def step() -> None:
        result[:] = [pgd_step(x_adv, x, grad, norm=norm, eps=0.03, alpha=0.01, clip=(0, 1))]

    replay = Timer(device, 1).graph(step)
    grad.copy_(torch.randn_like(grad))  # in the same memory
    replay()
    assert torch.equal(result[0], pgd_step(x_adv, x, grad, norm=norm, eps=0.03, alpha=0.01, clip=(0, 1)))


# -- streams ----------------------------------------------------------------------------------------------------------


@on_a_gpu_only
def test_two_streams_at_once_give_what_each_gives_alone(model: nn.Module) -> None:
    op = torch.ops.sn_fast.power_step.default
    jobs = []
    for half in (layers(model)[::2], layers(model)[1::2]):
        weights, us, vs, code = power_arguments(half)
        jobs.append((weights, us, vs, code, 3, "fp32"))
    alone = [tensors(op(*job)) for job in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jobs]
    different = torch.zeros(len(jobs), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        for i, (job, stream) in enumerate(zip(jobs, streams)):
            with torch.cuda.stream(stream):
                for a, b in zip(tensors(op(*job)), alone[i]):
                    different[i] += (a != b).any()
    torch.cuda.synchronize()
    assert different.tolist() == [0, 0]
