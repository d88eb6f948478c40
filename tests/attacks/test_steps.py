"""The updates: directions, projections, precision, layouts, cost."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sn_fast.attacks import pgd, pgd_step, project, random_start, wrm, wrm_step
from sn_fast.attacks.gradient import Objective
from sn_fast.ops import pgd_step as pgd_ops
from sn_fast.ops import wrm_step as wrm_ops
from sn_fast.reference import pgd_step as pgd_reference
from sn_fast.reference import samples as in_samples
from sn_fast.reference import wrm_step as wrm_reference

from ..kernels.whole_models import plain_pytorch
from .models import per_sample_norm, same_bits

NORMS = ("Linf", "L2", "L1", "L1-exact")
CANONICAL = {"Linf": "inf", "L2": "2", "L1": "1", "L1-exact": "1-exact"}
BATCH = (4, 3, 6, 5)


def triple(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv, well inside every ball used here, then x and a gradient."""
    x = torch.rand(shape, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x + 1e-3 * torch.randn_like(x), x, torch.randn_like(x)))  # type: ignore


def expected_direction(grad: Tensor, norm: str) -> Tensor:
    """In float64, straight from the definition."""
    g = grad.double().flatten(1)
    if norm == "Linf":
        d = g.sign()
    elif norm == "L1-exact":
        top = g.abs() == g.abs().amax(dim=1, keepdim=True)
        d = g.sign() * top / top.sum(dim=1, keepdim=True)
    else:
        g = g / g.abs().amax(dim=1, keepdim=True)
        d = g / g.norm(p={"L2": 2, "L1": 1}[norm], dim=1, keepdim=True)
    return d.reshape(grad.shape)


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_step_follows_the_definition(norm: str, targeted: bool) -> None:
    x_adv, x, grad = triple(torch.float64)
    moved = pgd_step(x_adv, x, grad, norm=norm, eps=math.inf, alpha=0.7, targeted=targeted)
    sign = -1 if targeted else 1
    torch.testing.assert_close(moved, x_adv + sign * 0.7 * expected_direction(grad, norm), rtol=0, atol=1e-14)
    inside = pgd_step(x_adv, x, grad, norm=norm, eps=0.2, alpha=0.7, targeted=targeted)
    assert same_bits(inside, project(moved, x, norm=norm, eps=0.2))
    if norm != "L1-exact":  # whose direction depends on the clip: test_l1_clip.py
        clipped = pgd_step(x_adv, x, grad, norm=norm, eps=0.2, alpha=0.7, clip=(0.1, 0.9), targeted=targeted)
        assert same_bits(clipped, project(moved, x, norm=norm, eps=0.2, clip=(0.1, 0.9)))


def test_true_l1_step_shares_between_ties() -> None:
    x = torch.zeros(1, 4)
    moved = pgd_step(x, x, torch.tensor([[3.0, -3.0, 2.999999, 0.0]]), norm="L1-exact", eps=1.0, alpha=1.0)
    assert moved.tolist() == [[0.5, -0.5, 0.0, 0.0]]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_gradient_changes_no_bit(norm: str, dtype: torch.dtype) -> None:
    x_adv, x, grad = triple(dtype)
    grad[1:] = 0
    moved = pgd_step(x_adv, x, grad, norm=norm, eps=1.0, alpha=0.25)
    assert same_bits(moved[1:], x_adv[1:])
    assert not torch.equal(moved[0], x_adv[0])


@pytest.mark.parametrize("norm", NORMS)
def test_powers_of_two_in_the_gradient_change_no_bit(norm: str) -> None:
    x_adv, x, grad = triple()
    moved = pgd_step(x_adv, x, grad, norm=norm, eps=0.3, alpha=0.1)
    for exponent in (-100, -64, -7, 50, 120):
        assert same_bits(pgd_step(x_adv, x, grad * 2.0**exponent, norm=norm, eps=0.3, alpha=0.1), moved)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-22),  # squares underflow
        (torch.float32, 1e-44),  # denormal: a handful of levels
        (torch.float32, 1e30),  # squares overflow
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
        (torch.float16, 6e-8),  # the smallest
        (torch.float16, 6e4),
    ],
)
def test_length_of_the_step_at_any_scale_of_the_gradient(norm: str, dtype: torch.dtype, scale: float) -> None:
    x = torch.zeros(3, 40, dtype=dtype)
    grad = (torch.randn(3, 40, dtype=torch.float64).clamp(-1, 1) * scale).to(dtype)
    assert grad.any(dim=1).all()
    moved = pgd_step(x, x, grad, norm=norm, eps=math.inf, alpha=0.5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(moved.double(), 0.5 * expected_direction(grad, norm), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_non_finite_gradient_elements_count_as_zero(norm: str) -> None:
    x_adv, x, grad = triple()
    broken = grad.clone()
    broken[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    broken[1] = math.nan
    clean = broken.nan_to_num(0.0, 0.0, 0.0)
    kwargs = {"norm": norm, "eps": 0.3, "alpha": 0.1}
    assert same_bits(pgd_step(x_adv, x, broken, **kwargs), pgd_step(x_adv, x, clean, **kwargs))
    assert same_bits(wrm_step(x_adv, x, broken, eps=0.3, step=0.5), wrm_step(x_adv, x, clean, eps=0.3, step=0.5))


@pytest.mark.parametrize("step", [1.0, 0.4])
def test_wrm_step_follows_the_definition(step: float) -> None:
    x_adv, x, grad = triple(torch.float64)
    wanted = x_adv + step * (0.3 * grad - (x_adv - x))
    torch.testing.assert_close(wrm_step(x_adv, x, grad, eps=0.3, step=step), wanted, rtol=0, atol=1e-15)
    clipped = wrm_step(x_adv, x, grad, eps=0.3, step=step, clip=(0.2, 0.8))
    torch.testing.assert_close(clipped, wanted.clamp(0.2, 0.8), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_float32_rounded_once(norm: str, dtype: torch.dtype) -> None:
    halves = triple(dtype)
    singles = [t.float() for t in halves]
    kwargs = {"norm": norm, "eps": 0.02, "alpha": 0.01, "clip": (0.05, 0.95)}
    assert same_bits(pgd_step(*halves, **kwargs), pgd_step(*singles, **kwargs).to(dtype))
    assert same_bits(wrm_step(*halves, eps=0.1, step=0.3), wrm_step(*singles, eps=0.1, step=0.3).to(dtype))
    kwargs.pop("alpha")
    assert same_bits(project(*halves[:2], **kwargs), project(*singles[:2], **kwargs).to(dtype))


def test_gradient_may_be_of_another_precision() -> None:
    x_adv, x, grad = triple(torch.float16)
    exact = pgd_step(x_adv, x, grad.float() * 1e-6, norm=2, eps=0.3, alpha=0.1)  # float16 would flush the gradient
    assert exact.dtype == torch.float16
    assert same_bits(exact, pgd_step(x_adv, x, grad.float(), norm=2, eps=0.3, alpha=0.1))


# -- samples are independent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_per_sample_amounts_equal_a_loop(norm: str) -> None:
    x_adv, x, grad = triple(torch.float64)
    eps, alpha = torch.tensor([0.0, 0.1, 2.0, math.inf]), torch.tensor([0.3, 0.05, 0.0, 1.5])
    together = pgd_step(x_adv, x, grad, norm=norm, eps=eps, alpha=alpha)
    projected = project(x_adv + grad, x, norm=norm, eps=eps)
    pulled = wrm_step(x_adv, x, grad, eps=eps[:3].repeat(2)[:4], step=0.5)
    for i in range(4):
        one = slice(i, i + 1)
        e, a = float(eps[i].double()), float(alpha[i].double())
        torch.testing.assert_close(
            together[one], pgd_step(x_adv[one], x[one], grad[one], norm=norm, eps=e, alpha=a), rtol=0, atol=1e-14
        )
        torch.testing.assert_close(
            projected[one], project((x_adv + grad)[one], x[one], norm=norm, eps=e), rtol=0, atol=1e-14
        )
        e = float(eps[i % 3])
        torch.testing.assert_close(
            pulled[one], wrm_step(x_adv[one], x[one], grad[one], eps=e, step=0.5), rtol=0, atol=1e-14
        )
    assert same_bits(together[0], x[0])  # eps = 0


@pytest.mark.parametrize("norm", NORMS)
def test_batch_equals_concatenation(norm: str) -> None:
    batch = triple()
    together = pgd_step(*batch, norm=norm, eps=0.2, alpha=0.3)
    alone = [pgd_step(*(t[i : i + 1] for t in batch), norm=norm, eps=0.2, alpha=0.3) for i in range(len(together))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_order_of_features_does_not_matter(norm: str) -> None:
    batch = triple(torch.float64, (3, 50))
    order = torch.randperm(50)
    moved = pgd_step(*batch, norm=norm, eps=0.2, alpha=0.3)
    permuted = pgd_step(*(t[:, order] for t in batch), norm=norm, eps=0.2, alpha=0.3)
    torch.testing.assert_close(permuted, moved[:, order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_inactive_samples_keep_every_bit(norm: str) -> None:
    x_adv, x, grad = triple()
    x_adv = x_adv + 5  # outside ball and clip
    active = torch.tensor([True, False, True, False])
    kwargs = {"norm": norm, "eps": 0.3, "alpha": 0.1, "clip": (0.0, 1.0)}
    moved = pgd_step(x_adv, x, grad, active=active, **kwargs)
    assert same_bits(moved[~active], x_adv[~active])
    assert same_bits(moved[active], pgd_step(x_adv, x, grad, **kwargs)[active])


# -- projections ------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
radii = st.one_of(st.just(0.0), st.floats(1e-3, 20.0))
seeds = st.integers(0, 2**31)


def pair(seed: int, shape: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two points and a centre, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z, w, x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return scale * z, scale * w, x


@given(shape=shapes, eps=radii, seed=seeds, scale=st.sampled_from([0.01, 1.0, 100.0]), norm=st.sampled_from(NORMS))
def test_projection_is_feasible_and_idempotent(
    shape: tuple[int, ...], eps: float, seed: int, scale: float, norm: str
) -> None:
    z, _, x = pair(seed, shape, scale)
    p = project(z, x, norm=norm, eps=eps)
    rounding = 1e-14 * z[0].numel() * (1 + scale)
    assert (per_sample_norm(p - x, norm) <= eps + rounding).all()
    torch.testing.assert_close(project(p, x, norm=norm, eps=eps), p, rtol=0, atol=rounding)


@given(
    shape=shapes,
    eps=radii,
    seed=seeds,
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    norm=st.sampled_from(["Linf", "L2", "L1-exact"]),
)
def test_projection_does_not_expand(shape: tuple[int, ...], eps: float, seed: int, scale: float, norm: str) -> None:
    z, w, x = pair(seed, shape, scale)
    apart = per_sample_norm(z - w, "L2")
    projected = per_sample_norm(project(z, x, norm=norm, eps=eps) - project(w, x, norm=norm, eps=eps), "L2")
    assert (projected <= apart + 1e-12 * (1 + scale)).all()


@given(shape=shapes, seed=seeds, norm=st.sampled_from(NORMS), dtype=st.sampled_from([torch.float16, torch.float32]))
def test_projection_keeps_the_bits_of_samples_inside(
    shape: tuple[int, ...], seed: int, norm: str, dtype: torch.dtype
) -> None:
    z, _, x = (t.to(dtype) for t in pair(seed, shape, 1.0))
    distance = per_sample_norm(z - x, norm)
    outside = project(z, x, norm=norm, eps=0.5 * distance)
    assert same_bits(project(z, x, norm=norm, eps=1.01 * distance), z)
    assert same_bits(project(z, x, norm=norm, eps=math.inf), z)
    assert not torch.equal(outside, z)


@given(shape=shapes, eps=st.floats(0.01, 5.0), seed=seeds)
def test_true_l1_projection_meets_its_optimality_conditions(shape: tuple[int, ...], eps: float, seed: int) -> None:
    """Outside the ball, the nearest point is soft thresholding by the one threshold that leaves norm eps."""
    z, _, x = pair(seed, shape, 3.0)
    d, p = (z - x).flatten(1), (project(z, x, norm="L1-exact", eps=eps) - x).flatten(1)
    for delta, found in zip(d, p, strict=True):
        if delta.abs().sum() <= eps:
            torch.testing.assert_close(found, delta, rtol=0, atol=1e-14)
            continue
        low, high = 0.0, float(delta.abs().max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((delta.abs() - middle).clamp(min=0).sum()) > eps else (low, middle)
        torch.testing.assert_close(found, delta.sign() * (delta.abs() - low).clamp(min=0), rtol=0, atol=1e-12)


@given(shape=shapes, eps=radii, seed=seeds, norm=st.sampled_from(NORMS))
def test_clip_after_the_ball_stays_in_the_ball(shape: tuple[int, ...], eps: float, seed: int, norm: str) -> None:
    z, _, x = pair(seed, shape, 3.0)
    x = x.clamp(-1, 1)
    p = project(z, x, norm=norm, eps=eps, clip=(-1, 1))
    assert (p.abs() <= 1).all()
    assert (per_sample_norm(p - x, norm) <= eps + 1e-12).all()


def test_ball_and_clip_as_one_box_are_the_two_in_turn() -> None:
    """Also where x lies outside the clip: the clip wins."""
    x = torch.tensor([[-2.0, -0.5, 0.5, 1.5, 3.0]])
    z = x + torch.tensor([[0.9, -0.9, 0.9, -0.9, 0.0]])
    lower, upper = torch.tensor(0.0), torch.tensor(1.0)
    low, high = pgd_reference.box(x, 0.3, None, lower, upper)
    assert torch.equal(z.clamp(low, high), project(z, x, norm="Linf", eps=0.3, clip=(0, 1)))


def test_radial_l1_is_not_the_nearest_point() -> None:
    x, z = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]])
    assert project(z, x, norm=1, eps=2.0).tolist() == [[1.5, 0.5]]
    assert project(z, x, norm="L1-exact", eps=2.0).tolist() == [[2.0, 0.0]]


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


# -- operators --------------------------------------------------------------------------------------------------------


def operator_calls(dtype: torch.dtype) -> list[tuple]:
    x_adv, x, grad = triple(dtype)
    eps, bound = torch.rand(4), torch.zeros(3, 1, 1)
    active = torch.tensor([True, False, True, True])
    last = x_adv.to(memory_format=torch.channels_last)
    return [
        *(
            (pgd_ops.pgd_step, (x_adv, x, grad, n, 0.1, 0.2, None, None, None, None, False, None))
            for n in CANONICAL.values()
        ),
        (pgd_ops.pgd_step, (last, x, grad, "2", 0.0, 0.0, eps, eps, bound, None, True, active)),
        (pgd_ops.pgd_step, (last, x, grad, "inf", math.inf, 0.1, None, None, x - 1, x + 1, False, None)),
        (wrm_ops.wrm_step, (last, x, grad, 0.1, None, 0.5, bound, bound + 1)),
        (wrm_ops.wrm_step, (x_adv, x, grad, 0.0, eps, 1.0, None, None)),
        *((pgd_ops.project, (last, x, n, 0.1, None, None, bound)) for n in CANONICAL.values()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    for op, args in operator_calls(dtype):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_step_compiles_in_one_graph(norm: str) -> None:
    batch = triple()

    def step(x_adv: Tensor, x: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return pgd_step(x_adv, x, grad * 2, norm=norm, eps=0.3, alpha=alpha, clip=(0, 1), active=alpha > 0.1) + 1

    alpha = torch.tensor([0.05, 0.2, 0.3, 0.4])
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(*batch, alpha), step(*batch, alpha))
