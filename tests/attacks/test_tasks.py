"""Losses, labels, and the rules by which logits decide: one logit, classes, and rules of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.attacks import FGM, PGD, WRM, fgm, pgd, wrm

from .models import CLASSES, conv_net, same_bits, samples
from .test_graph import Captures, captures

__all__ = ["captures"]  # a fixture

ATTACKS = (fgm, pgd, wrm)
every_attack = pytest.mark.parametrize("attack", ATTACKS)


def bce(logits: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.flatten(), y.to(logits.dtype), reduction="none")


def positive(logits: Tensor) -> Tensor:
    return (logits.flatten() > 0).long()


@pytest.fixture(params=["column", "flat"])
def one_logit(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with one logit, (B, 1) or (B,), and labels that it gets right but for a third."""
    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)] + [nn.Flatten(0)] * (request.param == "flat")
    model, x = nn.Sequential(*layers), torch.randn(12, 6)
    y = positive(model(x).detach())
    y[::3] = 1 - y[::3]
    return model, x, y


# -- loss="bce" -------------------------------------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("targeted", [False, True])
def test_bce_is_binary_cross_entropy(one_logit, attack: Callable[..., Any], targeted: bool) -> None:
    model, x, y = one_logit
    x_adv, info = attack(model, x, y, eps=0.4, loss="bce", targeted=targeted, return_info=True)
    wanted, other = attack(model, x, y, eps=0.4, loss=bce, predict=positive, targeted=targeted, return_info=True)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(info.loss, bce(model(x_adv), y))
    fooled = (positive(model(x_adv)) == y) if targeted else (positive(model(x_adv)) != y)
    assert torch.equal(info.success, fooled)
    assert torch.equal(other.success, fooled)
    sign = -1 if targeted else 1
    assert (sign * (info.loss - bce(model(x), y)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64])
def test_labels_0_and_1_of_any_dtype(one_logit, dtype: torch.dtype) -> None:
    model, x, y = one_logit
    wanted, info = pgd(model, x, y, eps=0.4, loss="bce", return_info=True)
    x_adv, other = pgd(model, x, y.to(dtype), eps=0.4, loss="bce", return_info=True)
    assert torch.equal(x_adv, wanted)
    assert torch.equal(info.success, other.success)


@every_attack
def test_labels_are_predicted_by_the_sign(one_logit, attack: Callable[..., Any]) -> None:
    model, x, _ = one_logit
    x_adv, info = attack(model, x, eps=0.6, loss="bce", return_info=True)
    predicted = positive(model(x))
    assert torch.equal(info.y, predicted)
    assert torch.equal(x_adv, attack(model, x, predicted, eps=0.6, loss="bce"))
    assert 0 < predicted.sum() < 12
    _, info = pgd(model, x, eps=0.6, loss="bce", random_start=True, return_info=True)
    assert torch.equal(info.y, predicted)


@pytest.mark.parametrize("named", [True, False])
def test_early_stop_keep_best_and_restarts_go_by_the_decision(one_logit, named: bool) -> None:
    model, x, y = one_logit
    options: dict[str, Any] = {"loss": "bce"} if named else {"loss": bce, "predict": positive}
    options |= {"eps": 2.0, "steps": 8, "return_info": True}
    stopped, info = pgd(model, x, y, early_stop=True, **options)
    assert same_bits(stopped[::3], x[::3])  # wrong from the start
    right = torch.arange(12) % 3 != 0
    assert (stopped[right] != x[right]).any(dim=1).all()
    assert torch.equal(info.success, positive(model(stopped)) != y)
    assert info.success[right].float().mean() > 0.5
    for more in ({"keep_best": True, "early_stop": True}, {"random_start": True, "restarts": 4}):
        best, info = pgd(model, x, y, **more, **options)
        assert torch.equal(info.success, positive(model(best)) != y)
        assert info.success[right].float().mean() > 0.5


def test_a_rule_of_the_callers_own_decides() -> None:
    """A threshold other than 0: argmax and sign would both be wrong."""
    model, x = nn.Linear(4, 1), torch.randn(40, 4)

    def above_one(logits: Tensor) -> Tensor:
        return (logits[:, 0] > 1).long()

    y = above_one(model(x).detach())
    for options in ({"loss": bce}, {"loss": "bce"}):
        x_adv, info = pgd(model, x, y, eps=1.5, predict=above_one, return_info=True, **options)
        assert torch.equal(info.success, above_one(model(x_adv)) != y)
        _, info = pgd(model, x, eps=1.5, predict=above_one, return_info=True, **options)
        assert torch.equal(info.y, y)
        stopped = pgd(model, x, 1 - y, eps=1.5, predict=above_one, early_stop=True, **options)
        assert same_bits(stopped, x)


def test_rules_of_several_labels_and_of_classes() -> None:
    model, x = nn.Linear(6, 3), torch.randn(10, 6)

    def each(logits: Tensor) -> Tensor:
        return logits > 0

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, y.float(), reduction="none").sum(dim=1)

    y = each(model(x).detach())
    x_adv, info = pgd(model, x, y, eps=0.5, loss=loss, predict=each, return_info=True)
    assert torch.equal(info.success, (each(model(x_adv)) != y).any(dim=1))
    assert info.success.any()
    _, info = pgd(model, x, ~y, eps=9.0, loss=loss, predict=each, targeted=True, return_info=True)
    assert info.success.any()

    def least(logits: Tensor) -> Tensor:
        return logits.argmin(dim=1)

    x_adv, info = fgm(model, x, eps=0.5, predict=least, return_info=True)
    assert torch.equal(info.y, least(model(x)))
    assert torch.equal(info.success, least(model(x_adv)) != info.y)


def test_attack_objects_take_the_same_keywords(one_logit) -> None:
    model, x, y = one_logit
    for made, attack in ((FGM, fgm), (PGD, pgd), (WRM, wrm)):
        for options in ({"loss": "bce"}, {"loss": bce, "predict": positive}):
            assert torch.equal(made(model, eps=0.3, **options)(x, y), attack(model, x, y, eps=0.3, **options))


# -- refusals ---------------------------------------------------------------------------------------------------------


@every_attack
def test_cross_entropy_of_one_logit_is_refused(one_logit, attack: Callable[..., Any]) -> None:
    model, x, y = one_logit
    for labels in (None, y, torch.zeros_like(y)):
        with pytest.raises(ValueError, match=r"loss='ce' of one logit per sample.*use loss='bce' with labels 0 and 1"):
            attack(model, x, labels, eps=0.4)


@every_attack
def test_bce_of_classes_is_refused(attack: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"loss='bce' needs one logit per sample.*got \(6, 5\); use loss='ce'"):
        attack(conv_net(), samples()[0], torch.zeros(6), eps=0.1, loss="bce")


DECIDING = [
    (pgd, {"return_info": True}),
    (fgm, {"return_info": True}),
    (wrm, {"return_info": True}),
    (pgd, {"early_stop": True}),
    (pgd, {"random_start": True, "restarts": 2}),
    (pgd, {"early_stop": True, "keep_best": True}),
    (pgd, {"targeted": True, "return_info": True}),
]


@pytest.mark.parametrize(("attack", "options"), DECIDING)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_missing_rule_is_named(one_logit, attack, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x, y = one_logit
    with pytest.raises(ValueError, match=r"one column, whose argmax means nothing: give predict="):
        attack(model, x, y.to(dtype), eps=0.4, loss=bce, **options)
    attack(model, x, y.to(dtype), eps=0.4, loss=bce, predict=positive, **options)


@every_attack
def test_a_missing_rule_is_named_where_labels_are_to_be_predicted(one_logit, attack) -> None:
    model, x, _ = one_logit
    with pytest.raises(ValueError, match=r"y=None needs a decision.*give predict="):
        attack(model, x, eps=0.4, loss=bce)


def test_no_rule_is_needed_where_nothing_is_decided(one_logit) -> None:
    model, x, y = one_logit
    for options in ({}, {"keep_best": True}):
        assert (pgd(model, x, y, eps=0.4, loss=bce, **options) != x).any(dim=1).all()
    _, info = pgd(model, x, y.float(), eps=0.4, loss=bce, return_info=True)  # a float y may be a value, not a label
    assert info.success is None
    with pytest.raises(ValueError, match=r"early_stop needs .* predict="):
        pgd(model, x, y.float(), eps=0.4, loss=bce, early_stop=True)
    _, info = pgd(model, x, y.float(), eps=0.4, loss=bce, predict=positive, return_info=True)
    assert info.success.dtype == torch.bool


BAD_LABELS = [
    (
        torch.full((6,), -100),
        ValueError,
        r"y has the label -100, must hold class indices >= 0; there is no ignore_index",
    ),
    (torch.tensor([0, 1, -1, 2, 3, 4]), ValueError, r"y has the label -1, must hold class indices >= 0"),
    (torch.tensor([0, 1, 5, 2, 3, 4]), ValueError, r"y has the label 5, but the model has 5 classes"),
    (torch.full((6,), 200, dtype=torch.uint8), ValueError, r"y has the label 200, but the model has 5 classes"),
    (torch.zeros(6), ValueError, r"y must hold class indices, got torch.float32; convert it with y.long\(\)"),
    (torch.zeros(6, dtype=torch.bool), ValueError, r"y must hold class indices, got torch.bool"),
    (torch.zeros(6, 1, dtype=torch.int64), ValueError, r"y has shape \(6, 1\), must be \(6,\)"),
    (torch.zeros((), dtype=torch.int64), ValueError, r"y has shape \(\), must be \(6,\)"),
    (torch.zeros(6, 5, dtype=torch.int64), ValueError, r"y has shape \(6, 5\), must be \(6,\)"),
]


@pytest.mark.parametrize(("y", "error", "message"), BAD_LABELS)
@pytest.mark.parametrize("targeted", [False, True])
@every_attack
def test_labels_that_are_no_classes(attack, targeted: bool, y: Tensor, error: type[Exception], message: str) -> None:
    model = conv_net()
    with pytest.raises(error, match=message):
        attack(model, samples()[0], y, eps=0.1, targeted=targeted)
    assert model.training


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 0]), r"y has values from 0 to 2; loss='bce' needs labels 0 and 1"),
        (torch.tensor([1, -1, 1, -1]), r"y has values from -1 to 1; .*\(for labels ±1: \(y \+ 1\) / 2\)"),
        (torch.tensor([0.0, 1.0, 0.3, 0.0]), r"y has values from 0 to 1; loss='bce' needs labels 0 and 1"),
        (torch.tensor([0.0, 1.0, torch.nan, 0.0]), r"loss='bce' needs labels 0 and 1"),
        (torch.zeros(4, 1), r"y has shape \(4, 1\), must be \(4,\)"),
        (torch.zeros(4, dtype=torch.complex64), r"y must hold labels 0 and 1, got torch.complex64"),
    ],
)
@every_attack
def test_labels_that_are_not_0_or_1(attack, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(nn.Linear(3, 1), torch.randn(4, 3), y, eps=0.1, loss="bce")


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_labels_of_a_callable_loss_that_argmax_never_gives(label: int) -> None:
    """As with F.cross_entropy's ignore_index: such a sample would count as fooled."""
    model, (x, y) = conv_net(), samples()
    y[2] = label

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y.clamp(0, 4), reduction="none")

    pgd(model, x, y, eps=0.1, steps=1, loss=loss)
    for options in ({"return_info": True}, {"early_stop": True}):
        with pytest.raises(ValueError, match=rf"y has the label {label}, but the model has 5 classes; .*predict="):
            pgd(model, x, y, eps=0.1, steps=1, loss=loss, **options)
        pgd(model, x, y, eps=0.1, steps=1, loss=loss, predict=lambda logits: logits.argmax(dim=1), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"predict": 3}, TypeError, r"predict must be a callable logits -> labels \(B,\), got int"),
        ({"predict": lambda z: 1}, ValueError, r"predict must return a tensor of labels \(6,\), got int"),
        ({"predict": lambda z: z.argmax()}, ValueError, r"predict must return a tensor of labels \(6,\), got \(\)"),
        ({"predict": lambda z: z}, ValueError, r"predict must return labels of shape \(6,\) with loss='ce'"),
        ({"loss": "BCE"}, ValueError, r"loss='BCE' is unknown"),
        ({"loss": None}, ValueError, r"loss=None is unknown"),
        ({"loss": lambda z, y: None}, ValueError, r"one value per sample, shape \(6,\), got NoneType"),
        (
            {"loss": lambda z, y: z.sum(dim=1), "predict": lambda z: z[:, :2]},
            ValueError,
            r"predict returned labels of shape \(6, 2\), y has \(6,\)",
        ),
    ],
)
@every_attack
def test_options_of_the_task(attack, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attack(conv_net(), *samples(), eps=0.1, return_info=True, **options)


@every_attack
def test_logits_of_other_batches_are_refused(attack) -> None:
    x, y = samples()
    with pytest.raises(ValueError, match=r"must return logits for each of the 6 samples, got shape \(3, 5\)"):
        attack(lambda z: z.flatten(1)[:3, :5], x, y, eps=0.1)
    with pytest.raises(ValueError, match=r"must return floating-point logits, got torch.int64"):
        attack(lambda z: z.flatten(1)[:, :5].long(), x, y, eps=0.1)


# -- graphs -----------------------------------------------------------------------------------------------------------


def test_a_replay_checks_labels_too(captures: Captures) -> None:
    """A replay runs no Python, and on a GPU a label out of range would end the process's use of the device."""
    model, (x, y) = conv_net().eval(), samples()
    pgd(model, x, y, eps=0.1, steps=2, cuda_graph=True)
    pgd(model, x, (y + 1) % CLASSES, eps=0.1, steps=2, cuda_graph=True)
    assert captures.replays == 1
    for wrong, message in ((CLASSES, r"label 5, but the model has 5"), (-1, r"label -1, must hold class indices")):
        with pytest.raises(ValueError, match=message):
            pgd(model, x, torch.where(y == y[0], wrong, y), eps=0.1, steps=2, cuda_graph=True)
    assert captures.replays == 1


def test_the_rule_is_part_of_a_graph(captures: Captures) -> None:
    model, x = nn.Linear(4, 1).eval(), torch.randn(6, 4)
    y = positive(model(x).detach())
    options = {"eps": 0.3, "steps": 2, "return_info": True}
    for predict in (None, positive, lambda logits: 1 - positive(logits)):
        for repeat in range(2):
            x_adv, info = pgd(model, x, y, loss="bce", predict=predict, cuda_graph=True, **options)
            wanted, expected = pgd(model, x, y, loss="bce", predict=predict, **options)
            assert torch.equal(x_adv, wanted)
            assert torch.equal(info.success, expected.success), repeat
    assert (captures.count, captures.replays) == (3, 3)
