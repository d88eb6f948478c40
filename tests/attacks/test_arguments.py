"""Every wrong argument gives one clear sentence with its name, its value and a way out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sn_fast.attacks import FGM, PGD, WRM, fgm, pgd, pgd_step, project, random_start, wrm, wrm_step
from sn_fast.attacks.arguments import canonical_norm

from ..on_device import DEVICE
from .models import conv_net, samples


@pytest.mark.parametrize(
    ("norms", "canonical"),
    [
        ((math.inf, np.inf, "inf", "Inf", "Linf", "linf", "L_inf", np.float32(np.inf)), "inf"),
        ((2, 2.0, "2", "L2", "l2", "l_2", np.int64(2)), "2"),
        ((1, 1.0, "1", "L1", "l1"), "1"),
        (("L1-exact", "l1-exact", "1-exact"), "1-exact"),
    ],
)
def test_norms_have_many_names(norms, canonical: str) -> None:
    assert {canonical_norm(n) for n in norms} == {canonical}


@pytest.mark.parametrize("norm", [3, 2.5, "l0", "", None, True, torch.tensor(2)])
def test_unknown_norms(norm) -> None:
    with pytest.raises(ValueError, match=r"norm=.* is unknown; choose inf, 2, 1 .* or \"L1-exact\""):
        pgd(conv_net(), *samples(4), norm=norm, eps=0.1)


@pytest.fixture(scope="module")
def base():
    return conv_net(), *samples(4)


BAD_OPTIONS = [
    ({"eps": -0.1}, ValueError, r"eps=-0.1 must be >= 0"),
    ({"eps": math.nan}, ValueError, r"eps=nan must be >= 0"),
    ({"eps": math.inf}, ValueError, r"eps=inf must be >= 0 and finite"),
    ({"eps": "0.1"}, TypeError, r"eps must be a number or a tensor of shape \(B,\), got str"),
    ({"eps": torch.ones(3)}, ValueError, r"eps has shape \(3,\), must be \(4,\): one value per sample"),
    ({"eps": torch.ones(4, 1, 1, 1)}, ValueError, r"eps has shape \(4, 1, 1, 1\), must be \(4,\)"),
    ({"eps": torch.tensor([1.0, -1, 1, 1])}, ValueError, r"eps has elements that are not >= 0"),
    ({"eps": torch.tensor([1.0, math.nan, 1, 1])}, ValueError, r"eps has elements that are not >= 0"),
    ({"clip": (1, 0)}, ValueError, r"clip=\(1, 0\): the lower bound must not be above the upper"),
    ({"clip": (0, math.nan)}, ValueError, r"clip=\(0, nan\)"),
    ({"clip": (torch.ones(3), 0)}, ValueError, r"clip: no element of the lower bound may be above"),
    ({"clip": 1}, ValueError, r"clip=1 must be a pair"),
    ({"clip": (0, 1, 2)}, ValueError, r"clip=\(0, 1, 2\) must be a pair"),
    ({"clip": ([0, 0], 1)}, ValueError, r"clip of shape \(2, 1, 1\) does not broadcast to x"),
    ({"clip": (torch.zeros(2, 4, 3, 8, 8), 1)}, ValueError, r"does not broadcast to x of shape \(4, 3, 8, 8\)"),
    ({"mean": [0.5, 0.5]}, ValueError, r"mean of shape \(2, 1, 1\) does not broadcast .* 3 numbers"),
    ({"std": 0}, ValueError, r"std has a 0"),
    ({"std": [0.2, 0.0, 0.2]}, ValueError, r"std has a 0"),
    ({"loss": "dlr"}, ValueError, r"loss='dlr' is unknown; choose \"ce\" or give a callable"),
    ({"model_mode": "test"}, ValueError, r"model_mode='test' is unknown; choose \"eval\", \"train\" or \"keep\""),
    ({"autocast_dtype": torch.float32}, ValueError, r"autocast_dtype=torch.float32 must be"),
    ({"loss": lambda logits, y: logits.sum()}, ValueError, r"one value per sample, shape \(4,\), got \(\)"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
@pytest.mark.parametrize("attack", [fgm, pgd, wrm])
def test_options_of_every_attack(base, attack, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attack(*base, **{"eps": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"steps=0 must be >= 1"),
        ({"steps": 1.5}, TypeError, r"steps must be an integer, got 1.5"),
        ({"alpha": -1.0}, ValueError, r"alpha=-1.0 must be >= 0 and finite"),
        ({"alpha": math.inf}, ValueError, r"alpha=inf must be >= 0 and finite"),
        ({"alpha": torch.ones(5)}, ValueError, r"alpha has shape \(5,\), must be \(4,\)"),
        ({"alpha": torch.tensor([1, 1, 1, math.inf])}, ValueError, r"alpha has elements that are not >= 0 and finite"),
        ({"restarts": 2}, ValueError, r"restarts=2 would repeat the same run; set random_start=True"),
        ({"restarts": 0}, ValueError, r"restarts=0 must be >= 1"),
        ({"random_start": True, "eps": math.inf, "alpha": 1.0}, ValueError, r"eps=inf must be >= 0 and finite"),
        ({"x_init": torch.zeros(4, 3, 8, 7)}, ValueError, r"x_init has shape \(4, 3, 8, 7\), x has \(4, 3, 8, 8\)"),
        ({"x_init": torch.zeros(4, 3, 8, 8), "random_start": True}, ValueError, r"x_init and random_start=True"),
    ],
)
def test_options_of_pgd(base, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pgd(*base, **{"eps": 0.1, **options})


def test_targeted_needs_labels(base) -> None:
    model, x, _ = base
    for attack in (
        FGM(model, eps=0.1, targeted=True),
        PGD(model, eps=0.1, targeted=True),
        WRM(model, eps=1, targeted=True),
    ):
        with pytest.raises(ValueError, match=r"targeted=True needs y"):
            attack(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"exactly one of gamma and eps = 1 / \(2 gamma\), got gamma=None, eps=None"),
        ({"gamma": 1.0, "eps": 0.5}, r"exactly one of gamma and eps"),
        ({"gamma": 0}, r"gamma=0 must be > 0"),
        ({"gamma": -1.0}, r"gamma=-1.0 must be >= 0"),
        ({"gamma": torch.tensor([1.0, 0, 1, 1])}, r"gamma has elements that are 0; all must be > 0"),
        ({"gamma": torch.tensor([1.0, -1, 1, 1])}, r"gamma has elements"),
        ({"gamma": 1.0, "steps": 0}, r"steps=0 must be >= 1"),
    ],
)
def test_options_of_wrm(base, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrm(*base, **options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), TypeError, r"x must be floating point, got torch.uint8; convert"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.complex64), TypeError, r"x must be floating point, got torch.complex64"),
        (np.zeros((4, 3, 8, 8)), TypeError, r"x must be a torch.Tensor, got ndarray"),
        (torch.zeros(()), ValueError, r"x of shape \(\) needs a batch dimension and one more; use x\[None\]"),
        (torch.zeros(4), ValueError, r"x of shape \(4,\) needs a batch dimension and one more"),
        (torch.zeros(4, 3, 0), ValueError, r"x of shape \(4, 3, 0\) has samples without elements"),
    ],
)
def test_samples(base, x, error: type[Exception], message: str) -> None:
    model, _, y = base
    for call in (
        lambda: pgd(model, x, y, eps=0.1),
        lambda: fgm(model, x, y, eps=0.1),
        lambda: wrm(model, x, y, eps=0.1),
        lambda: random_start(x, norm=2, eps=0.1),
        lambda: project(x, x, norm=2, eps=0.1),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"y has shape \(3,\), must be \(4,\): one value per sample"),
        (torch.zeros(4, 5), ValueError, r"y has shape \(4, 5\), must be \(4,\)"),
        (torch.zeros(4), TypeError, r"y must hold class indices, got torch.float32; convert it with y.long\(\)"),
        ([0, 1, 2, 3], TypeError, r"y must be a torch.Tensor, got list"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), ValueError, rf"y is on meta, x on {DEVICE.type}"),
    ],
)
def test_labels(base, y, error: type[Exception], message: str) -> None:
    model, x, _ = base
    with pytest.raises(error, match=message):
        pgd(model, x, y, eps=0.1)


def test_narrow_integer_labels_are_taken(base) -> None:
    model, x, y = base
    assert torch.equal(pgd(model, x, y.to(torch.uint8), eps=0.1), pgd(model, x, y, eps=0.1))


def test_labels_of_a_callable_loss_must_have_the_samples_first(base) -> None:
    model, x, _ = base
    with pytest.raises(ValueError, match=r"one entry for each of the 4 samples of x"):
        pgd(model, x, torch.zeros(3, 5), eps=0.1, loss=lambda logits, y: (logits - y).sum(dim=1))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (None, TypeError, r"model must be callable, got NoneType"),
        (lambda x: (x, x), TypeError, r"must return a tensor of logits, got tuple; wrap the model"),
        (lambda x: x.detach().flatten(1), ValueError, r"does not depend on x in a way autograd can follow"),
        (lambda x: x, ValueError, r"logits of shape \(B, classes\), got \(4, 3, 8, 8\)"),
    ],
)
def test_models(base, model, error: type[Exception], message: str) -> None:
    _, x, y = base
    with pytest.raises(error, match=message):
        pgd(model, x, y, eps=0.1)


def test_predicted_labels_need_classes(base) -> None:
    _, x, _ = base
    with pytest.raises(ValueError, match=r"y=None needs logits of shape \(B, classes\)"):
        pgd(lambda z: z, x, eps=0.1, loss=lambda logits, y: logits.flatten(1).sum(dim=1))


def test_tensors_of_single_steps() -> None:
    x = torch.rand(4, 3)
    options = {"norm": 2, "eps": 0.1, "alpha": 0.1}
    for args, error, message in (
        ((x[:3], x, x), ValueError, r"x_adv has shape \(3, 3\), x has \(4, 3\)"),
        ((x, x, x[:, :2]), ValueError, r"grad has shape \(4, 2\), x has \(4, 3\)"),
        ((x.double(), x, x), TypeError, r"x_adv has dtype torch.float64, x has torch.float32; convert it"),
        ((x, x, x.long()), TypeError, r"grad has dtype torch.int64"),
        ((x, x, x.to("meta")), ValueError, rf"grad is on meta, x on {DEVICE.type}.*; move it with grad.to"),
        ((x, x, None), TypeError, r"grad must be a torch.Tensor, got NoneType"),
    ):
        if args[2] is not None:
            with pytest.raises(error, match=message):
                pgd_step(*args, **options)
            with pytest.raises(error, match=message):
                wrm_step(*args, eps=0.1, step=1.0)
    with pytest.raises(ValueError, match=r"active has shape \(3,\), must be \(4,\)"):
        pgd_step(x, x, x, active=torch.ones(3, dtype=torch.bool), **options)
    with pytest.raises(TypeError, match=r"active must be a bool tensor, got torch.float32"):
        pgd_step(x, x, x, active=torch.ones(4), **options)
    with pytest.raises(TypeError, match=r"active must be a torch.Tensor, got list"):
        pgd_step(x, x, x, active=[True] * 4, **options)
    with pytest.raises(TypeError, match=r"step must be a number, got Tensor"):
        wrm_step(x, x, x, eps=0.1, step=torch.ones(()))
    with pytest.raises(ValueError, match=r"step=-1 must be >= 0 and finite"):
        wrm_step(x, x, x, eps=0.1, step=-1)
    with pytest.raises(ValueError, match=r"eps=-1 must be >= 0"):
        project(x, x, norm=2, eps=-1)
    with pytest.raises(ValueError, match=r"eps=inf must be >= 0 and finite"):
        random_start(x, norm=2, eps=math.inf)


def test_numbers_may_be_scalars_of_any_kind(base) -> None:
    model, x, y = base
    wanted = pgd(model, x, y, eps=0.5, steps=2)
    for eps in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.full((4,), 0.5, dtype=torch.float64)):
        torch.testing.assert_close(pgd(model, x, y, eps=eps, steps=np.int64(2)), wanted, rtol=0, atol=1e-6)


def test_a_wrong_argument_leaves_the_model_alone() -> None:
    model = conv_net()
    with pytest.raises(ValueError, match="mean of shape"):
        pgd(model, *samples(4), eps=0.1, mean=[1.0, 2.0])
    assert model.training
