"""Options of the attacks, one by one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.attacks import FGM, PGD, WRM, AttackInfo, fgm, pgd, pgd_step, random_start, wrm

from .models import CLASSES, Recorder, conv_net, per_sample_norm, same_bits, samples

NORMS = ("Linf", "L2", "L1", "L1-exact")
RADII = {"Linf": 0.1, "L2": 0.8, "L1": 8.0, "L1-exact": 8.0}


@pytest.fixture
def setting() -> tuple[nn.Module, Tensor, Tensor]:
    return conv_net().eval(), *samples(12)


def loss_of(model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_a_loop_of_its_public_step(setting, norm: str) -> None:
    model, x, y = setting
    eps, clip = RADII[norm], (0.29, 0.71)
    x_adv = x
    for _ in range(4):
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        x_adv = pgd_step(x_adv, x, grad, norm=norm, eps=eps, alpha=2 * eps / 4, clip=clip)
    assert torch.equal(pgd(model, x, y, norm=norm, eps=eps, steps=4, clip=clip), x_adv)


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_raise_the_loss_within_ball_and_clip(setting, norm: str) -> None:
    model, x, y = setting
    x_adv = pgd(model, x, y, norm=norm, eps=RADII[norm], clip=(0, 1))
    assert (loss_of(model, x_adv, y) > loss_of(model, x, y)).all()
    assert (per_sample_norm(x_adv - x, norm) <= RADII[norm] * (1 + 1e-5)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_a_sample_does_not_feel_its_batch(setting) -> None:
    model, x, y = setting
    for attack in (PGD(model, eps=0.4, steps=4), FGM(model, eps=0.4), WRM(model, eps=1.0, steps=4)):
        alone = torch.cat([attack(x[i : i + 1], y[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(attack(x, y)[:4], alone, rtol=0, atol=1e-6)


def test_labels_default_to_the_prediction_at_x(setting) -> None:
    model, x, _ = setting
    predicted = model(x).argmax(dim=1)
    for attack in (PGD(model, eps=0.4, steps=3), FGM(model, eps=0.4), WRM(model, eps=1.0, steps=3)):
        assert torch.equal(attack(x), attack(x, predicted))
    start = x + 0.3 * torch.randn_like(x)
    assert (model(start).argmax(dim=1) != predicted).any()
    options = {"eps": 50.0, "alpha": 0.3, "steps": 2, "x_init": start}
    assert torch.equal(pgd(model, x, **options), pgd(model, x, predicted, **options))
    _, info = pgd(model, x, eps=0.4, random_start=True, return_info=True)
    assert torch.equal(info.y, predicted)


def test_targeted_moves_towards_y(setting) -> None:
    model, x, _ = setting
    y = (model(x).argmax(dim=1) + 1) % CLASSES
    for attack in (
        PGD(model, eps=0.4, targeted=True),
        FGM(model, eps=0.2, targeted=True),
        WRM(model, eps=0.1, targeted=True),
    ):
        assert (loss_of(model, attack(x, y), y) < loss_of(model, x, y)).all()
    _, info = pgd(model, x, y, eps=5.0, targeted=True, return_info=True)
    assert info.success.all()


def test_fgm_does_not_project_and_takes_per_sample_eps(setting) -> None:
    model, x, y = setting
    eps = torch.linspace(0.0, 1.0, 12)
    x_adv = fgm(model, x, y, norm=2, eps=eps)
    torch.testing.assert_close(per_sample_norm(x_adv - x, "L2").float(), eps, rtol=1e-5, atol=1e-7)
    assert same_bits(x_adv[0], x[0])


@pytest.mark.parametrize("norm", NORMS)
def test_per_sample_eps_and_alpha_equal_a_loop(norm: str) -> None:
    model = conv_net().eval().double()  # in float32 the sign of a tiny gradient can depend on the size of the batch
    x, y = samples(4, torch.float64)
    eps = RADII[norm] * torch.tensor([0.0, 0.5, 1.0, 2.0])
    default = pgd(model, x, y, norm=norm, eps=eps, steps=3)
    given = pgd(model, x, y, norm=norm, eps=eps, alpha=eps / 2, steps=3)
    for i in range(4):
        one = x[i : i + 1], y[i : i + 1]
        e = float(eps[i])
        torch.testing.assert_close(default[i : i + 1], pgd(model, *one, norm=norm, eps=e, steps=3), rtol=0, atol=2e-6)
        torch.testing.assert_close(
            given[i : i + 1], pgd(model, *one, norm=norm, eps=e, alpha=e / 2, steps=3), rtol=0, atol=2e-6
        )


def test_wrm_takes_gamma_or_eps_one_or_per_sample(setting) -> None:
    model, x, y = setting
    gamma = torch.linspace(1.0, 3.0, 12)
    expected = torch.cat([wrm(model, x[i : i + 1], y[i : i + 1], gamma=float(gamma[i])) for i in range(12)])
    torch.testing.assert_close(wrm(model, x, y, gamma=gamma), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(wrm(model, x, y, eps=0.5 / gamma), expected, rtol=0, atol=1e-5)
    assert torch.equal(wrm(model, x, y, gamma=math.inf), x)


def test_no_ball(setting) -> None:
    model, x, y = setting
    for norm in NORMS:
        x_adv = pgd(model, x, y, norm=norm, eps=math.inf, alpha=3.0, steps=3)
        assert (per_sample_norm(x_adv - x, norm) > 3.0).all()


@pytest.mark.parametrize("zero", [0.0, torch.zeros(12)], ids=["number", "tensor"])
def test_eps_zero_returns_a_copy(setting, zero: float | Tensor) -> None:
    model, x, y = setting
    for attack in (
        PGD(model, norm="Linf", eps=zero),
        PGD(model, norm=2, eps=zero, random_start=True, restarts=2, keep_best=True),
        FGM(model, eps=zero),
        WRM(model, eps=zero),
    ):
        for options in ({}, {"return_info": True}):
            attack.options.update(options)
            result = attack(x, y)
            x_adv = result[0] if options else result
            assert same_bits(x_adv, x)
            assert x_adv.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            if options:
                torch.testing.assert_close(result[1].loss, loss_of(model, x, y), rtol=0, atol=1e-6)


def test_empty_batch() -> None:
    def model(x: Tensor) -> Tensor:
        raise AssertionError("no sample, no forward")

    x, y = torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)
    for attack in (PGD(model, norm=1, eps=0.1, random_start=True), FGM(model, eps=0.1), WRM(model, eps=0.1)):
        assert attack(x, y).shape == x.shape
        assert attack(x).shape == x.shape
        attack.options["return_info"] = True
        _, info = attack(x, y)
        assert info.loss.shape == info.success.shape == (0,)
    for norm in NORMS:
        assert pgd_step(x, x, x, norm=norm, eps=0.1, alpha=0.1).shape == x.shape
        assert random_start(x, norm=norm, eps=0.1).shape == x.shape


# -- normalised inputs, bounds, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.4, [0.4, 0.5, 0.6], torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), None])
@pytest.mark.parametrize("std", [0.2, (0.2, 0.25, 0.3), None])
def test_mean_and_std_are_a_wrapped_model(setting, mean, std) -> None:
    model, x, _ = setting
    shift = torch.as_tensor(0.0 if mean is None else mean).reshape(-1, 1, 1)
    scale = torch.as_tensor(1.0 if std is None else std).reshape(-1, 1, 1)

    def wrapped(z: Tensor) -> Tensor:
        return model((z - shift) / scale)

    options = {"norm": "Linf", "eps": 0.03, "steps": 3, "clip": (0, 1), "random_start": True}
    x_adv, info = pgd(
        model, x, mean=mean, std=std, generator=torch.Generator().manual_seed(1), return_info=True, **options
    )
    wanted, other = pgd(wrapped, x, generator=torch.Generator().manual_seed(1), return_info=True, **options)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(info.loss, other.loss, rtol=1e-5, atol=1e-5)


def test_clip_per_channel_and_per_element(setting) -> None:
    model, x, y = setting
    low, high = [0.3, 0.35, 0.4], torch.tensor([0.6, 0.65, 0.7])
    x = x.clamp(torch.tensor(low).reshape(3, 1, 1), high.reshape(3, 1, 1))
    for norm in NORMS:
        x_adv = pgd(model, x, y, norm=norm, eps=3.0, clip=(low, high), random_start=True)
        for c in range(3):
            assert low[c] <= x_adv[:, c].min()
            assert x_adv[:, c].max() <= high[c]
    full = pgd(model, x, y, norm="L2", eps=3.0, clip=(x - 0.01, x + 0.02))
    assert (full >= x - 0.01).all()
    assert (full <= x + 0.02).all()
    x = x.clamp(0.4, 0.6)
    assert (wrm(model, x, y, eps=3.0, clip=(0.4, 0.6)) <= 0.6).all()
    assert (fgm(model, x, y, eps=3.0, clip=(0.4, 0.6)) >= 0.4).all()


def test_autocast_reaches_the_model_alone(setting) -> None:
    model, x, y = setting
    seen = []
    model[4].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x_adv, info = pgd(model, x, y, eps=0.4, steps=2, autocast_dtype=torch.bfloat16, return_info=True)
    assert seen == [torch.bfloat16] * 3
    assert x_adv.dtype == info.loss.dtype == torch.float32
    torch.testing.assert_close(x_adv, pgd(model, x, y, eps=0.4, steps=2), rtol=0, atol=0.05)


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_models(norm: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).to(torch.bfloat16)
    x, y = samples(dtype=torch.bfloat16)
    x_adv, info = pgd(model, x, y, norm=norm, eps=RADII[norm], steps=3, clip=(0, 1), return_info=True)
    assert x_adv.dtype == torch.bfloat16
    assert info.loss.dtype == torch.float32
    assert (info.loss > F.cross_entropy(model(x).float(), y, reduction="none")).all()
    assert (per_sample_norm(x_adv - x, norm) <= 1.02 * RADII[norm]).all()
    shift, scale = torch.full((3,), 0.5), torch.full((3,), 0.2)  # in float32; the model stays in bfloat16
    assert pgd(model, x, y, norm=norm, eps=0.1, steps=1, mean=shift, std=scale).dtype == torch.bfloat16


# -- losses -----------------------------------------------------------------------------------------------------------


def test_a_callable_loss_is_summed(setting) -> None:
    model, x, y = setting

    def ce(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")

    for attack, options in ((pgd, {"eps": 0.4}), (fgm, {"eps": 0.4}), (wrm, {"eps": 0.4})):
        assert torch.equal(attack(model, x, y, loss=ce, **options), attack(model, x, y, **options))


def test_a_callable_loss_may_have_labels_of_its_own(setting) -> None:
    model, x, _ = setting
    y = torch.randn(12, CLASSES)

    def distance(logits: Tensor, y: Tensor) -> Tensor:
        return (logits - y).square().sum(dim=1)

    _, info = pgd(model, x, y, eps=0.4, loss=distance, random_start=True, restarts=2, return_info=True)
    assert info.success is None
    assert (info.loss > distance(model(x), y)).all()
    with pytest.raises(ValueError, match="early_stop needs class labels"):
        pgd(model, x, y, eps=0.4, loss=distance, early_stop=True)


# -- choosing iterates ------------------------------------------------------------------------------------------------


def jagged(x: Tensor) -> Tensor:
    """Logits that rise and fall along the way, so that the last iterate is seldom the best."""
    z = x.flatten(1)
    return torch.stack([(60 * z[:, i : i + 40]).sin().mean(dim=1) for i in range(0, 160, 40)], dim=1)


@pytest.mark.parametrize("targeted", [False, True])
def test_keep_best_returns_the_best_of_all_iterates(targeted: bool) -> None:
    x, _ = samples(16)
    y = torch.randint(4, (16,))
    model = Recorder(jagged)
    x_adv, info = pgd(model, x, y, eps=3.0, alpha=0.7, steps=9, keep_best=True, targeted=targeted, return_info=True)
    losses = torch.stack([F.cross_entropy(logits, y, reduction="none") for logits in model.logits[:10]])
    best = (losses.min if targeted else losses.max)(dim=0)
    torch.testing.assert_close(info.loss, best.values, rtol=1e-6, atol=0)
    assert torch.equal(x_adv, torch.stack(model.inputs)[best.indices, torch.arange(16)])
    assert best.indices.unique().numel() > 2  # the last was not always the best
    assert not torch.equal(losses[9], best.values)


def test_keep_best_is_not_fooled_by_nan() -> None:
    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)

    def model(z: Tensor) -> Tensor:
        logits = torch.stack([-z.sum(dim=1), z.sum(dim=1)], dim=1)
        return torch.where(z.sum(dim=1, keepdim=True) > 2.1, math.nan, logits)

    _, info = pgd(model, x, y, norm="Linf", eps=0.1, alpha=0.02, steps=5, keep_best=True, return_info=True)
    assert info.loss.isfinite().all()
    assert (info.loss > loss_of(model, x, y)).all()


def test_early_stop_freezes_a_sample_where_it_first_fools(setting) -> None:
    model, x, _ = setting
    y = model(x).argmax(dim=1)
    recorder = Recorder(model)
    options = {"eps": 3.0, "alpha": 0.12, "steps": 12}
    x_adv, info = pgd(recorder, x, y, early_stop=True, return_info=True, **options)
    free = Recorder(model)
    pgd(free, x, y, return_info=True, **options)
    fooled = torch.stack([logits.argmax(dim=1) != y for logits in free.logits])
    assert fooled[-1].any()
    first = torch.where(fooled.any(dim=0), fooled.int().argmax(dim=0), 12)
    assert (first < 12).any()
    wanted = torch.stack(free.inputs)[first, torch.arange(12)]
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-6)
    assert torch.equal(info.success, fooled.any(dim=0))
    assert same_bits(pgd(model, x, (y + 1) % CLASSES, early_stop=True, **options), x)  # fooled from the start


def test_early_stop_is_for_good() -> None:
    """Also if the model, as with dropout, changes its mind about a sample."""
    scale = 1.0

    def model(z: Tensor) -> Tensor:
        nonlocal scale
        scale = -scale
        return scale * torch.cat([z - 9, -z], dim=1)

    x, y = torch.ones(1, 1), torch.ones(1, dtype=torch.int64)
    recorder = Recorder(model)
    pgd(recorder, x, y, norm="Linf", eps=1.0, steps=4, early_stop=True)
    fooled = [logits.argmax(dim=1) != y for logits in recorder.logits]
    assert fooled == [True, False, True, False]
    assert all(torch.equal(z, x) for z in recorder.inputs)


def test_early_stop_of_a_targeted_attack(setting) -> None:
    model, x, _ = setting
    predicted = model(x).argmax(dim=1)
    y = torch.where(torch.arange(12) < 6, predicted, (predicted + 1) % CLASSES)
    x_adv = pgd(model, x, y, eps=0.1, steps=3, targeted=True, early_stop=True)
    assert same_bits(x_adv[:6], x[:6])
    assert (x_adv[6:] != x[6:]).flatten(1).any(dim=1).all()


def test_restarts_are_not_fooled_by_nan() -> None:
    def model(z: Tensor) -> Tensor:
        return torch.where(z > 0, math.nan, torch.cat([-z, z], dim=1))

    x, y = torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64)
    _, info = pgd(
        model, x, y, norm="Linf", eps=1.0, alpha=0.0, random_start=True, restarts=12, steps=1, return_info=True
    )
    assert info.loss.isfinite().all()


def test_restarts_keep_the_best_run_of_each_sample() -> None:
    x, _ = samples(16)
    y = torch.randint(4, (16,))
    model = Recorder(jagged)
    x_adv, info = pgd(
        model,
        x,
        y,
        eps=2.0,
        steps=3,
        random_start=True,
        restarts=4,
        generator=torch.Generator().manual_seed(3),
        return_info=True,
    )
    assert info.gradients == 12
    ends = [model.logits[3 + 4 * run] for run in range(4)]
    losses = torch.stack([F.cross_entropy(logits, y, reduction="none") for logits in ends])
    fooled = torch.stack([logits.argmax(dim=1) != y for logits in ends])
    rank = torch.where(fooled, losses + 1e3, losses)
    best = rank.argmax(dim=0)
    assert best.unique().numel() > 2
    assert torch.equal(x_adv, torch.stack([model.inputs[3 + 4 * run] for run in range(4)])[best, torch.arange(16)])
    assert torch.equal(info.success, fooled.any(dim=0))


NECK_AND_NECK = torch.tensor([2.0, 2.01, -9.0, -9.0])  # fools, at a low loss of label 0
FLAT = torch.tensor([0.01, 0.0, 0.0, 0.0])  # does not fool, at a higher loss


def two_sided(left: Tensor, right: Tensor):
    """Logits left of 0 and right of it; label 0 loses a little towards the right."""
    return lambda z: torch.where(z > 0, right, left) - 1e-4 * z * torch.tensor([1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(("left", "right"), [(NECK_AND_NECK, FLAT), (FLAT, NECK_AND_NECK)])
def test_a_restart_that_fools_beats_one_with_a_higher_loss(left: Tensor, right: Tensor) -> None:
    x, y = torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64)
    options = {"norm": "Linf", "eps": 1.0, "alpha": 0.0, "steps": 1, "random_start": True, "restarts": 12}
    x_adv, info = pgd(two_sided(left, right), x, y, return_info=True, **options)
    assert info.success.all()
    assert ((x_adv > 0) == (right is NECK_AND_NECK)).all()


def test_keep_best_alone_goes_by_the_loss() -> None:
    x, y = torch.full((1, 1), -0.5), torch.zeros(1, dtype=torch.int64)
    options = {"norm": "Linf", "eps": 1.0, "alpha": 0.6, "steps": 1, "keep_best": True}
    assert pgd(two_sided(NECK_AND_NECK, FLAT), x, y, **options) > 0
    assert pgd(two_sided(FLAT, NECK_AND_NECK), x, y, **options) == x
    assert pgd(two_sided(FLAT, NECK_AND_NECK), x, y, early_stop=True, **options) > 0


# -- starting points --------------------------------------------------------------------------------------------------


def test_x_init_is_brought_into_ball_and_clip_first(setting) -> None:
    model, x, y = setting
    recorder = Recorder(model)
    far = x + torch.randn_like(x)
    pgd(recorder, x, y, norm=2, eps=0.5, steps=1, x_init=far, clip=(0.2, 0.8))
    assert (per_sample_norm(recorder.inputs[0] - x, "L2") <= 0.5 + 1e-6).all()
    assert recorder.inputs[0].min() >= 0.2
    near = x + 1e-3
    recorder = Recorder(model)
    pgd(recorder, x, y, norm="Linf", eps=0.5, steps=1, x_init=near)
    assert same_bits(recorder.inputs[0], near)


def test_random_start_is_uniform_in_the_box() -> None:
    x = torch.full((2000, 5), 3.0, dtype=torch.float64)
    u = (random_start(x, norm="Linf", eps=0.5) - x) / 0.5
    assert u.abs().max() <= 1
    torch.testing.assert_close(u.mean(), torch.zeros(()).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(u.square().mean(), torch.tensor(1 / 3).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("norm", ["L2", "L1", "L1-exact"])
@pytest.mark.parametrize("features", [1, 2, 3])
def test_random_start_is_uniform_in_the_ball(norm: str, features: int) -> None:
    """Against rejection sampling from the cube: moments, how elements compare, and the volume within each radius."""
    n = 40_000
    x = torch.full((n, features), 3.0, dtype=torch.float64)
    drawn = (random_start(x, norm=norm, eps=0.5) - x) / 0.5
    cube = 2 * torch.rand(12 * n, features, dtype=torch.float64) - 1
    wanted = cube[per_sample_norm(cube, norm) <= 1]
    assert (per_sample_norm(drawn, norm) <= 1 + 1e-12).all()
    torch.testing.assert_close(drawn.mean(dim=0), torch.zeros(features).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.T @ drawn / n, wanted.T @ wanted / len(wanted), rtol=0, atol=0.01)
    smallest_to_largest = [d.abs().sort(dim=1).values.mean(dim=0) for d in (drawn, wanted)]
    torch.testing.assert_close(*smallest_to_largest, rtol=0, atol=0.008)
    for radius in (0.3, 0.6, 0.9):
        inside = (per_sample_norm(drawn, norm) <= radius).double().mean()
        assert float(inside) == pytest.approx(radius**features, abs=0.012)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_options(norm: str) -> None:
    x, _ = samples(4)
    eps = torch.tensor([0.0, 0.01, 0.1, 0.2])

    def draw(x: Tensor, **options) -> Tensor:
        return random_start(x, norm=norm, eps=eps, generator=torch.Generator().manual_seed(5), **options)

    start = draw(x)
    assert same_bits(start[0], x[0])
    assert (per_sample_norm(start - x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    assert torch.equal(draw(x), start)
    last = draw(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, start, rtol=0, atol=1e-7)
    assert draw(x, clip=(0.45, 0.55)).min() >= 0.45
    half = draw(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), start, rtol=0, atol=1e-3)
    assert not torch.equal(random_start(x, norm=norm, eps=0.1), random_start(x, norm=norm, eps=0.1))


def test_random_start_in_high_dimension_is_near_the_surface() -> None:
    x = torch.zeros(8, 3, 32, 32)
    radius = per_sample_norm(random_start(x, norm=2, eps=1.0), "L2")
    assert (radius > 0.99).all()


# -- objects and information ------------------------------------------------------------------------------------------


def test_attack_objects_keep_model_and_options(setting) -> None:
    model, x, y = setting
    attack = PGD(model, norm="Linf", eps=0.1, steps=2)
    wanted = pgd(model, x, y, norm="Linf", eps=0.1, steps=2)
    assert torch.equal(attack(x, y), wanted)
    assert torch.equal(attack.perturb(x, y), wanted)
    assert repr(attack) == "PGD(Sequential, norm='Linf', eps=0.1, steps=2)"
    assert torch.equal(FGM(model, eps=0.1)(x), fgm(model, x, eps=0.1))
    assert torch.equal(WRM(model, gamma=2.0)(x), wrm(model, x, gamma=2.0))
    with pytest.raises(TypeError, match="stpes"):
        PGD(model, eps=0.1, stpes=2)
    with pytest.raises(TypeError, match="eps"):
        FGM(model)


def test_info_describes_the_result(setting) -> None:
    model, x, y = setting
    for attack, gradients in (
        (PGD(model, eps=1.0, steps=3, return_info=True), 3),
        (FGM(model, eps=1.0, return_info=True), 1),
        (WRM(model, eps=0.5, steps=3, return_info=True), 4),
    ):
        x_adv, info = attack(x, y)
        assert isinstance(info, AttackInfo)
        torch.testing.assert_close(info.loss, loss_of(model, x_adv, y), rtol=1e-6, atol=1e-6)
        assert torch.equal(info.success, model(x_adv).argmax(dim=1) != y)
        assert torch.equal(info.y, y)
        assert info.gradients == gradients
        assert not info.loss.requires_grad
