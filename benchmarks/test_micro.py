"""Micro-benchmarks of single calls, for pytest-benchmark: no part of the test suite, as times assert nothing.

pytest benchmarks/test_micro.py --benchmark-autosave              # before a change
pytest benchmarks/test_micro.py --benchmark-compare               # after it
pytest benchmarks/test_micro.py -k update --benchmark-columns=min,median,iqr
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import pgd, pgd_step, project, random_start, wrm_step
from sn_fast.inspection.timing import like_a_long_process

from .cpu.networks import NETWORKS

Benchmark = Callable[..., Any]
SAMPLES = {"small": (8, 3, 32, 32), "large": (256, 3, 32, 32)}
LAYERS = {
    "conv": (nn.Conv2d(32, 32, 3, padding=1), (16, 16)),
    "strided": (nn.Conv2d(32, 64, 3, stride=2, padding=1), (16, 16)),
    "linear": (nn.Linear(512, 256), None),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    like_a_long_process()
    yield
    torch.set_num_threads(threads)


def samples(size: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(SAMPLES[size])
    return (x + 0.02 * torch.randn_like(x)).clamp(0, 1), x, 1e-3 * torch.randn_like(x)


@pytest.mark.parametrize("size", SAMPLES)
@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_update(benchmark: Benchmark, norm: float, size: str) -> None:
    x_adv, x, grad = samples(size)
    benchmark(pgd_step, x_adv, x, grad, norm=norm, eps=0.1, alpha=0.02, clip=(0, 1))


@pytest.mark.parametrize("size", SAMPLES)
def test_update_of_wrm(benchmark: Benchmark, size: str) -> None:
    x_adv, x, grad = samples(size)
    benchmark(wrm_step, x_adv, x, grad, eps=0.1, step=0.5)


@pytest.mark.parametrize("norm", [math.inf, 2, 1, "L1-exact"])
def test_projection(benchmark: Benchmark, norm: Any) -> None:
    x_adv, x, _ = samples("small")
    benchmark(project, x_adv, x, norm=norm, eps=0.1)


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_random_start(benchmark: Benchmark, norm: float) -> None:
    benchmark(random_start, samples("small")[1], norm=norm, eps=0.1)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["power", "lanczos", "block"])
def test_norm(benchmark: Benchmark, method: Any, layer: str) -> None:
    op = sn_fast.operator_of(*LAYERS[layer])
    benchmark(sn_fast.operator_norm, op, method=method, tol=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["auto", "fft"])
def test_bound(benchmark: Benchmark, method: Any, layer: str) -> None:
    if layer == "linear" and method == "fft":
        pytest.skip("a matrix has no frequencies")
    op = sn_fast.operator_of(*LAYERS[layer])
    benchmark(sn_fast.operator_norm_bound, op, method=method)


@pytest.mark.parametrize("name", ["ResNet-18, a quarter wide", "ViT, every Linear"])
@pytest.mark.parametrize("what", ["refresh", "forward, unchanged", "forward, frozen", "step of an attack"])
def test_network(benchmark: Benchmark, what: str, name: str) -> None:
    network = NETWORKS[name]
    model = sn_fast.apply_spectral_norm(network.seeded(), network.example()).eval().requires_grad_(False)
    x, y = network.example(), torch.zeros(1, dtype=torch.long)
    if what == "refresh":
        benchmark(sn_fast.update_spectral_norm, model)
    elif what == "forward, unchanged":
        benchmark(model, x)
    elif what == "forward, frozen":
        with sn_fast.frozen_sigma(model):
            benchmark(model, x)
    else:
        benchmark(pgd, model, x, y, norm=2, eps=0.1, steps=1)
