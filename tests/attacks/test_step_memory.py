"""The memory of the updates: layouts, passes, parts of a batch, what calls share."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sn_fast.attacks import pgd, pgd_step, project, random_start, wrm, wrm_step
from sn_fast.attacks.gradient import Objective
from sn_fast.reference import pgd_step as pgd_reference
from sn_fast.reference import samples as in_samples
from sn_fast.reference import wrm_step as wrm_reference

from ..kernels.whole_models import plain_pytorch
from .models import CANONICAL, NORMS, same_bits, triple

# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_channels_last_equals_contiguous(norm: str) -> None:
    contiguous = triple()
    last = [t.to(memory_format=torch.channels_last) for t in contiguous]
    for grad in (contiguous[2], last[2]):  # the gradient's layout is the model's business
        moved = pgd_step(last[0], last[1], grad, norm=norm, eps=0.2, alpha=0.3, clip=([0.1, 0.2, 0.3], 1))
        assert moved.is_contiguous(memory_format=torch.channels_last)
        wanted = pgd_step(*contiguous, norm=norm, eps=0.2, alpha=0.3, clip=([0.1, 0.2, 0.3], 1))
        torch.testing.assert_close(moved, wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_arguments_are_left_alone(norm: str) -> None:
    tensors = [*triple(), torch.full((4,), 0.01), torch.full((4,), 0.02), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)]
    before = [t.clone() for t in tensors]
    x_adv, x, grad, eps, alpha, lower, upper = tensors
    results = [
        pgd_step(x_adv, x, grad, norm=norm, eps=eps, alpha=alpha, clip=(lower, upper)),
        project(x_adv, x, norm=norm, eps=eps, clip=(lower, upper)),
        project(x_adv, x, norm=norm, eps=math.inf),
        wrm_step(x_adv, x, grad, eps=eps, step=0.5, clip=(lower, upper)),
        random_start(x, norm=norm, eps=eps, clip=(lower, upper)),
        random_start(x, norm=norm, eps=0.0),
    ]
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    assert all(r.untyped_storage().data_ptr() not in storages for r in results)


REFERENCES = {
    "sn_fast::pgd_step": pgd_reference.pgd_step,
    "sn_fast::project": pgd_reference.project,
    "sn_fast::wrm_step": wrm_reference.wrm_step,
}


class PassCount(TorchDispatchMode):
    """Counts reads and writes of tensors with ``numel`` elements, and looks into the library's own operators."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.counting = True
        self.passes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "sn_fast":
            with self:
                return REFERENCES[func._schema.name](*args, **kwargs)
        result = func(*args, **kwargs)
        if self.counting:
            self.passes += self._passes(func, args, kwargs, result)
        return result

    def _passes(self, func, args, kwargs, result) -> int:
        def is_full(t: object) -> bool:
            return isinstance(t, Tensor) and t.numel() == self.numel

        aliases = [r.alias_info for r in func._schema.returns]
        if any(a is not None and not a.is_write for a in aliases) or "empty" in func._schema.name:
            return 0  # a view, or no data yet
        count = sum(map(is_full, args))  # an in-place operation reads its first argument
        count += sum(is_full(v) for k, v in kwargs.items() if k != "out")
        return count + is_full(result)


@pytest.mark.parametrize(
    ("norm", "clip", "first", "passes"),
    [
        ("Linf", None, 10, 10),
        ("Linf", (0, 1), 10, 10),  # ball and clip are one box
        ("L2", None, 8, 11),  # the first step ends inside the ball
        ("L2", (0, 1), 10, 13),
        ("L1", (0, 1), 14, 17),
        ("wrm", None, 7, 7),
        ("wrm", (0, 1), 9, 9),
    ],
)
def test_passes_between_gradient_and_next_forward(
    monkeypatch: pytest.MonkeyPatch, norm: str, clip: tuple[float, float] | None, first: int, passes: int
) -> None:
    x, y = torch.rand(4, 3, 7, 5), torch.arange(4)
    counter = PassCount(x.numel())
    gradient = Objective.gradient
    segments = []

    def counted(self: Objective, x_adv: Tensor):
        result = gradient(self, x_adv)
        counter.counting, counter.passes = True, 0
        return result

    def model(inputs: Tensor) -> Tensor:
        counter.counting = False
        segments.append(counter.passes)
        return inputs.flatten(1)[:, :5] * 1.0

    monkeypatch.setattr(Objective, "gradient", counted)
    with plain_pytorch(), counter:  # what kernels pass over is another count
        if norm == "wrm":
            wrm(model, x, y, eps=0.1, steps=3, clip=clip)
        else:
            pgd(model, x, y, norm=norm, eps=0.1, steps=4, clip=clip)
    assert segments[1:] == [first, passes, passes]


@pytest.mark.parametrize(("norm", "passes", "of_step"), [("Linf", 8, 14), ("L2", 7, 11), ("L1", 9, 15)])
def test_passes_of_single_calls(norm: str, passes: int, of_step: int) -> None:
    x_adv, x, grad = triple()
    with PassCount(x.numel()) as counter:
        project(x_adv, x, norm=norm, eps=0.1)
        assert counter.passes == passes
        counter.passes = 0
        pgd_step(x_adv, x, grad, norm=norm, eps=0.1, alpha=0.1)
        assert counter.passes == of_step


# -- parts of a batch on the CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_fastest"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_parts_of_a_batch_are_its_samples(
    monkeypatch: pytest.MonkeyPatch, norm: str, layout: str, samples: int
) -> None:
    """Whatever belongs to a sample goes with it: amounts, activity, bounds; whatever does not goes to all parts."""
    x_adv, x, grad = triple(shape=(7, 3, 6, 5))
    if layout == "channels_last":
        x_adv, x = (t.to(memory_format=torch.channels_last) for t in (x_adv, x))
    elif layout == "batch_fastest":
        x_adv, grad = (t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (x_adv, grad))
    grad[3] = 0
    grad[4, 0, 0, 0] = math.nan
    eps, alpha, active = torch.rand(7), torch.rand(7), torch.arange(7) % 3 != 1
    bounds = [None, 0.25, torch.rand(7, 1, 1, 1), torch.rand(3, 1, 1), torch.rand(1, 3, 6, 5), torch.rand(7, 3, 6, 5)]
    for bound in bounds:
        results = []
        monkeypatch.setattr(in_samples, "_GRAIN", 1)
        for part in (10**9, samples * x[0].numel()):
            monkeypatch.setattr(in_samples, "_PART", part)
            args = (x_adv, x, grad, CANONICAL[norm], 0.3, 0.1, eps, alpha, bound, 0.9, True, active)
            results.append(
                (pgd_reference.pgd_step(*args), pgd_reference.project(*args[:2], *args[3:5], eps, bound, 0.9))
            )
            results[-1] += (wrm_reference.wrm_step(*args[:3], 0.3, eps, 0.5, bound, None),)
        for whole, parts in zip(*results, strict=True):
            assert whole.stride() == parts.stride()
            torch.testing.assert_close(parts, whole, rtol=0, atol=3e-7)


# -- memory that calls share ------------------------------------------------------------------------------------------

LARGE = (20, 3, 32, 32)  # larger than what is made anew in every call


def test_results_do_not_share_the_memory_of_intermediate_ones() -> None:
    x_adv, x, grad = triple(shape=LARGE)
    for norm in ("Linf", "L2", "L1"):
        for dtype in (torch.float32, torch.float16):
            args = [t.to(dtype) for t in (x_adv, x, grad)]
            first = pgd_step(*args, norm=norm, eps=0.01, alpha=0.1)
            kept = first.clone()
            second = pgd_step(args[0], args[1], -args[2], norm=norm, eps=0.01, alpha=0.1)
            assert torch.equal(first, kept)
            assert not torch.equal(first, second)


def test_steps_in_inference_mode_and_outside() -> None:
    results = []
    in_samples.BUFFERS._kept.clear()
    args = triple(shape=LARGE)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            results.append([pgd_step(*args, norm=n, eps=0.01, alpha=0.1) for n in ("Linf", "L2")])
    assert in_samples.BUFFERS._kept
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("norm", NORMS)
def test_the_default_device_does_not_matter(norm: str) -> None:
    in_samples.BUFFERS._kept.clear()
    args = triple(shape=LARGE)
    with torch.device("meta"):
        inside = pgd_step(*args, norm=norm, eps=0.01, alpha=0.1)
    assert torch.equal(inside, pgd_step(*args, norm=norm, eps=0.01, alpha=0.1))
    assert all(t.device.type == "cpu" for pair in in_samples.BUFFERS._kept.values() for t in pair)


def test_steps_in_several_threads() -> None:
    batches = [triple(shape=LARGE) for _ in range(4)]

    def steps(batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        return [pgd_step(*batch, norm=n, eps=0.01, alpha=0.1) for n in ("Linf", "L2") for _ in range(20)]

    expected = [steps(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(steps, batches), expected):
            assert all(torch.equal(a, b) for a, b in zip(found, right))
