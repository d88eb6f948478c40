"""Where x, clip, mean and std may lie, and how often an attack waits for the device to find out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast.attacks import FGM, PGD, WRM, fgm, methods, pgd, pgd_step, project, random_start, reading, wrm, wrm_step

from .models import conv_net, same_bits, samples
from .test_guarantees import NoWaiting

ATTACKS: dict[str, Callable[..., Any]] = {
    "fgm": lambda *args, **kw: fgm(*args, **{"eps": 0.03, **kw}),
    "pgd": lambda *args, **kw: pgd(*args, **{"eps": 0.03, "steps": 2, **kw}),
    "pgd random": lambda *args, **kw: pgd(*args, **{"eps": 0.03, "steps": 2, "random_start": True, **kw}),
    "wrm": lambda *args, **kw: wrm(*args, **{"eps": 0.03, "steps": 2, **kw}),
    "FGM": lambda model, x, y, **kw: FGM(model, **{"eps": 0.03, **kw})(x, y),
    "PGD": lambda model, x, y, **kw: PGD(model, **{"eps": 0.03, **kw}).perturb(x, y),
    "WRM": lambda model, x, y, **kw: WRM(model, **{"gamma": 9.0, **kw})(x, y),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)

IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


# -- x within clip ----------------------------------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("eps", [{}, {"eps": 0.0}, {"eps": torch.zeros(6)}])
def test_normalised_images_are_refused(attack, eps: dict[str, Any]) -> None:
    model, (x, y) = conv_net(), samples()
    x = (x - 0.485) / 0.229
    if attack is ATTACKS["WRM"]:
        eps = {}
    for clip in ((0, 1), (0, None), ([0.0, 0.0, 0.0], 1.0), (torch.zeros(6, 1, 1, 1), torch.ones(8, 8)), (0, math.inf)):
        with pytest.raises(ValueError, match=r"x has values from -\d.* to .*, outside .*clip.* mean= and std="):
            attack(model, x, y, clip=clip, **eps)
    assert model.training


def test_the_message_names_values_and_clip() -> None:
    x = torch.tensor([[0.5, -2.25]])
    with pytest.raises(ValueError, match=r"x has values from -2.25 to 0.5, outside clip=\(0, 1\)"):
        pgd(nn.Linear(2, 3), x, torch.zeros(1, dtype=torch.int64), eps=0.1, clip=(0, 1))


@given(
    low=st.floats(-3, 1),
    width=st.floats(1e-3, 300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    side=st.sampled_from(["below", "above"]),
    form=st.sampled_from(["numbers", "per channel", "per element", "one-sided"]),
)
def test_rounding_is_allowed_and_no_more(low: float, width: float, dtype: torch.dtype, side: str, form: str) -> None:
    model, y = nn.Linear(8, 3).to(dtype), torch.zeros(2, dtype=torch.int64)
    high = low + width
    inside = torch.linspace(low, high, 16, dtype=torch.float64).reshape(2, 8)
    clip: tuple = (low, high)
    if form == "per channel":
        clip = (torch.full((8,), low, dtype=torch.float64), [high] * 8)
    elif form == "per element":
        clip = (torch.full((2, 8), low, dtype=torch.float64), torch.full((2, 8), high, dtype=torch.float64))
    elif form == "one-sided":
        clip = (low, None) if side == "below" else (None, high)
    unit = torch.finfo(dtype).eps * max(abs(low), abs(high))
    for part, is_refused in ((0.0, False), (0.5, False), (3.0, True)):
        off = part * (1e-4 * width + unit)
        x = inside.clone()
        if side == "below":
            x[1, 3] = low - off
        else:
            x[0, 2] = high + off
        x = x.to(dtype)
        if is_refused:
            with pytest.raises(ValueError, match="outside"):
                fgm(model, x, y, eps=0.1, clip=clip)
        else:
            x_adv = fgm(model, x, y, eps=0.1, clip=clip)
            assert x_adv.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_clip_in_normalised_units_holds_normalised_images(dtype: torch.dtype) -> None:
    """Black and white pixels are rounded to either side of the bounds."""
    mean, std = (t.reshape(3, 1, 1) for t in IMAGENET)
    model, (x, y) = conv_net(batch_norm=False).to(dtype), samples()
    x = ((x.round() - mean) / std).to(dtype)
    for clip in (((0 - mean) / std, (1 - mean) / std), ((-mean / std).flatten().tolist(), None)):
        pgd(model, x, y, eps=0.1, steps=1, clip=clip)


@every_attack
def test_images_with_mean_and_std_are_taken(attack) -> None:
    model, (x, y) = conv_net().eval(), samples()
    x_adv = attack(model, x, y, clip=(0, 1), mean=IMAGENET[0], std=IMAGENET[1])
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_an_empty_batch_lies_anywhere() -> None:
    x_adv = pgd(conv_net(), torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), eps=0.1, clip=(0, 1))
    assert x_adv.shape == (0, 3, 8, 8)


def test_steps_do_not_look_at_x() -> None:
    """They belong into loops: looking would wait for the device at every step."""
    x, grad = torch.randn(2, 3, 10)
    with NoWaiting():
        pgd_step(x, x, grad, norm=2, eps=0.1, alpha=0.1, clip=(0, 1))
        wrm_step(x, x, grad, eps=0.1, step=0.5, clip=(0, 1))
        project(x, x, norm=2, eps=0.1, clip=(0, 1))
        random_start(x, norm=2, eps=0.1, clip=(0, 1))


# -- one-sided clips --------------------------------------------------------------------------------------------------


@every_attack
def test_one_sided_clips(attack) -> None:
    model, (x, y) = conv_net().eval(), samples()
    big = {} if attack is ATTACKS["WRM"] else {"eps": 5.0}

    def drawn(clip: Any) -> Tensor:
        torch.manual_seed(0)
        return attack(model, x, y, clip=clip, **big)

    assert same_bits(drawn((0.2, None)), drawn((0.2, math.inf)))
    assert same_bits(drawn((None, 0.8)), drawn((-math.inf, 0.8)))
    for clip in ((None, None), (-math.inf, math.inf), (-math.inf, None)):
        assert same_bits(drawn(clip), drawn(None))
    torch.testing.assert_close(drawn((-1e300, 1e300)), drawn(None), rtol=0, atol=1e-6)
    assert drawn((0.2, None)).min() >= 0.2
    assert drawn((None, 0.8)).max() <= 0.8
    assert drawn(([0.1, 0.2, 0.3], None))[:, 2].min() >= 0.3
    assert drawn((None, x + 0.01)).sub(x).max() <= 0.01 + 1e-6


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L1-exact"])
def test_one_sided_clips_of_single_steps(norm: str) -> None:
    x, grad = torch.rand(2, 4, 30)
    for clip in ((0.1, None), (None, 0.9)):
        low, high = (b if b is not None else s * math.inf for b, s in zip(clip, (-1, 1)))
        for step in (
            pgd_step(x, x, grad - 0.5, norm=norm, eps=3.0, alpha=2.0, clip=clip),
            project(x + grad, x, norm=norm, eps=3.0, clip=clip),
            random_start(x, norm=norm, eps=3.0, clip=clip),
            wrm_step(x, x, grad, eps=1.0, step=1.0, clip=clip),
        ):
            assert step.min() >= low
            assert step.max() <= high


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        ((1, 0), ValueError, r"clip=\(1, 0\): the lower bound must not be above"),
        ((math.nan, None), ValueError, r"clip=\(nan, None\).*neither may be NaN"),
        ((None, math.nan), ValueError, r"clip=\(None, nan\).*neither may be NaN"),
        ((None, torch.full((3,), math.nan)), ValueError, r"clip: no element .* or NaN"),
        ((torch.full((3,), 0.9), 0.1), ValueError, r"clip: no element of the lower bound"),
        ((math.inf, None), ValueError, r"outside clip=\(inf, None\)"),
        (("0", "1"), TypeError, r"clip='0' must be a number, a sequence of 3 numbers"),
        ((0, [None, 1, 1]), TypeError, r"clip=\[None, 1, 1\] must be a number"),
        ("01", ValueError, r"clip='01' must be a pair"),
        ((0,), ValueError, r"clip=\(0,\) must be a pair"),
    ],
)
@every_attack
def test_clips_that_are_none(attack, clip: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attack(conv_net(), *samples(), clip=clip)


# -- mean and std -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("std", "message"),
    [
        (0, r"std has a 0"),
        (-0.0, r"std has a 0"),
        (-0.2, r"std=-0.2 must be > 0"),
        (math.nan, r"std=nan must be > 0"),
        (math.inf, r"std=inf must be > 0 and from"),
        (1e-50, r"std=1e-50 must be > 0 and from 1.18e-38"),
        (1e-40, r"std=1e-40 must be > 0 and from 1.18e-38"),
        (1e39, r"std=1e\+39 must be"),
        ([0.2, 0.0, 0.2], r"std has a 0"),
        ([0.2, -0.2, 0.2], r"std has elements that are not valid: they must be > 0"),
        ([0.2, math.nan, 0.2], r"std has elements that are not valid"),
        (torch.tensor([0.2, 1e-41, 0.2]), r"std has elements that are not valid"),
        (torch.tensor([0.2, math.inf, 0.2]), r"std has elements that are not valid"),
        (torch.full((3, 8, 8), -1.0), r"std has elements that are not valid"),
        ("x", r"std='x' must be a number"),
    ],
)
@every_attack
def test_std_that_nothing_can_be_divided_by(attack, std: Any, message: str) -> None:
    model = conv_net()
    with pytest.raises((ValueError, TypeError), match=message):
        attack(model, *samples(), std=std)
    assert model.training


@pytest.mark.parametrize(
    "mean", [math.nan, math.inf, -math.inf, 1e39, [0.5, math.nan, 0.5], torch.full((3,), math.inf)]
)
@every_attack
def test_mean_that_is_not_finite(attack, mean: Any) -> None:
    with pytest.raises(ValueError, match=r"mean.* must be finite in torch.float32"):
        attack(conv_net(), *samples(), mean=mean)


def test_std_is_judged_in_the_precision_of_x() -> None:
    """1e-5 is a denormal number of float16, and 1e5 none."""
    for dtype, is_refused in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        model, x, y = nn.Linear(4, 3).to(dtype), torch.rand(2, 4).to(dtype), torch.zeros(2, dtype=torch.int64)
        for options in ({"std": 1e-5}, {"std": torch.full((4,), 1e-5)}, {"mean": 1e5}, {"mean": torch.tensor(1e5)}):
            if is_refused:
                with pytest.raises(ValueError, match=r"torch.float16, the dtype of x"):
                    fgm(model, x, y, eps=0.1, **options)
            else:
                fgm(model, x, y, eps=0.1, **options)


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each wait has read."""
    counts: list[int] = []
    tolist = Tensor.tolist

    def counted(self: Tensor) -> Any:
        counts.append(self.numel())
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return counts


@every_attack
def test_an_attack_waits_for_the_device_once(attack, reads: list[int]) -> None:
    model, (x, y) = conv_net(batch_norm=False), samples()
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append(len(reads)))
    mean, std = (t.clone() for t in IMAGENET)
    eps = {"gamma": torch.full((6,), 9.0)} if attack is ATTACKS["WRM"] else {"eps": torch.full((6,), 0.05)}
    with NoWaiting():
        attack(model, x, y, clip=(torch.zeros(3), 1), mean=mean, std=std, return_info=True, **eps)
    assert len(reads) == 1
    assert seen
    assert set(seen) == {1}  # before the first forward


def test_no_wait_where_nothing_is_to_be_known(reads: list[int]) -> None:
    with NoWaiting():
        pgd(conv_net(batch_norm=False), samples()[0], eps=0.1, mean=0.5, std=0.2)
    assert not reads


@pytest.mark.parametrize("state", ["is_compiling", "capturing"])
def test_nothing_is_read_in_compiled_code_or_a_capture(
    monkeypatch: pytest.MonkeyPatch, reads: list[int], state: str
) -> None:
    model, (x, y) = conv_net(batch_norm=False), samples()
    if state == "is_compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(reading.Tensor, "is_cuda", property(lambda self: True), raising=False)
    found = reading.Reading(x)
    monkeypatch.undo()
    assert not found.possible
    monkeypatch.setattr(methods, "Reading", lambda x: found)
    pgd(model, x - 5, y, eps=torch.full((6,), 0.1), steps=1, clip=(torch.zeros(3), 1), std=torch.ones(3))


def test_meta_and_fake_tensors_hold_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    x, y = samples()
    meta = pgd(model.to("meta"), x.to("meta"), y.to("meta"), eps=0.1, steps=1, clip=(0, 1))
    assert meta.shape == x.shape
    with FakeTensorMode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
        fake = pgd(model, torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64), eps=0.1, steps=1, clip=(0, 1))
    assert fake.shape == x.shape
