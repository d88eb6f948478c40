"""What an attack leaves behind: nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sn_fast import normalization as spectral
from sn_fast import operator_norm, operator_of
from sn_fast.attacks import fgm, pgd, random_start, wrm

from .models import CLASSES, Recorder, conv_net, same_bits, samples

Attack = Callable[..., Tensor]

ATTACKS = {
    "fgm": lambda model, x, y, **kw: fgm(model, x, y, eps=0.1, **kw),
    "pgd": lambda model, x, y, **kw: pgd(model, x, y, norm="Linf", eps=0.1, steps=3, clip=(0, 1), **kw),
    "pgd-all": lambda model, x, y, **kw: pgd(
        model,
        x,
        y,
        eps=torch.linspace(0.1, 0.3, len(x)),
        steps=2,
        random_start=True,
        restarts=2,
        early_stop=True,
        keep_best=True,
        mean=[0.5, 0.4, 0.3],
        std=0.3,
        return_info=True,
        **kw,
    )[0],
    "wrm": lambda model, x, y, **kw: wrm(model, x, y, gamma=2.0, steps=2, **kw),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


class State:
    """Bits and identities of a model's parameters, gradients, buffers and flags."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {n: (t, t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self.grads = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
        self.requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
        self.flags = {n: m.training for n, m in model.named_modules()}

    def assert_unchanged(self) -> None:
        now = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        assert now.keys() == self.tensors.keys()
        for name, (tensor, value) in self.tensors.items():
            assert now[name] is tensor, f"{name} was replaced"
            assert same_bits(tensor, value), f"{name} has changed"
        for name, p in self.model.named_parameters():
            grad, value = self.grads[name]
            assert p.grad is grad, f"{name}.grad was replaced"
            assert grad is None or same_bits(grad, value), f"{name}.grad has changed"
            assert p.requires_grad == self.requires_grad[name]
        assert {n: m.training for n, m in self.model.named_modules()} == self.flags


def trained_net() -> nn.Sequential:
    """A net with torch's own spectral norm too, gradients in some parameters, and mixed flags."""
    model = conv_net(dropout=0.2)
    nn.utils.parametrizations.spectral_norm(model[4])
    x, y = samples()
    nn.functional.cross_entropy(model(x), y).backward()
    model[0].weight.grad = None
    model[0].bias.requires_grad_(False)
    model.train()
    model[1].eval()  # a frozen BatchNorm inside a model in training
    return model


@every_attack
@pytest.mark.parametrize("model_mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("caller", [nullcontext, torch.no_grad, torch.inference_mode])
def test_model_and_input_are_left_as_they_were(attack: Attack, model_mode: str, caller) -> None:
    model = trained_net()
    x, y = samples()
    x.requires_grad_()
    before, state = x.detach().clone(), State(model)
    with caller():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x_adv = attack(model, x, y, model_mode=model_mode)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    state.assert_unchanged()
    assert same_bits(x.detach(), before)
    assert x.requires_grad
    assert x.grad is None
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    assert not x_adv.is_inference()
    assert not torch.equal(x_adv, x)


@pytest.mark.parametrize(("attack", "forward"), [("fgm", 1), ("pgd", 1), ("pgd", 3), ("pgd-all", 4), ("wrm", 2)])
@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_also_when_the_model_raises(attack: str, forward: int, model_mode: str) -> None:
    model = trained_net()
    x, y = samples()
    before, state = x.clone(), State(model)
    calls = 0

    def fail(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == forward:
            raise RuntimeError("out of memory, say")

    with model[7].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        ATTACKS[attack](model, x, y, model_mode=model_mode)
    state.assert_unchanged()
    assert same_bits(x, before)
    assert torch.is_grad_enabled()


@every_attack
def test_inference_tensors_are_fine(attack: Attack) -> None:
    model = conv_net()
    with torch.inference_mode():
        x, y = samples()
        assert x.is_inference()
        torch.manual_seed(0)
        inside = attack(model, x, y)
    torch.manual_seed(0)
    assert torch.equal(attack(model, x.clone(), y.clone()), inside)


def test_inference_tensors_as_options() -> None:
    model = conv_net()
    x, y = samples()
    with torch.inference_mode():
        options = {
            "eps": torch.full((6,), 0.1),
            "alpha": torch.full((6,), 0.04),
            "clip": (torch.zeros(3), torch.ones(3)),
            "mean": torch.full((3,), 0.5),
            "std": torch.full((3,), 0.2),
            "x_init": x + 0.01,
        }
        x_adv = pgd(model, x, y, norm="Linf", **options)
    wanted = pgd(
        model, x, y, norm="Linf", eps=0.1, alpha=0.04, clip=(0, 1), mean=0.5, std=0.2, x_init=options["x_init"].clone()
    )
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-6)


@every_attack
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_result_is_new_and_laid_out_like_x(attack: Attack, layout: str) -> None:
    model = conv_net().double()  # in float32 the sign of a tiny gradient can depend on the layout
    x, y = samples(dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    torch.manual_seed(1)
    x_adv = attack(model, x, y)
    assert x_adv.stride() == x.stride()
    assert x_adv.dtype == x.dtype
    assert x_adv.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    torch.manual_seed(1)
    torch.testing.assert_close(x_adv, attack(model, x.contiguous(), y), rtol=0, atol=1e-5)


def test_batch_norm_runs_in_the_mode_asked_for() -> None:
    model = conv_net()
    x, y = samples()
    model[1].running_mean.fill_(3.0)
    attacked = {mode: fgm(model, x, y, eps=0.5, model_mode=mode) for mode in ("eval", "train", "keep")}
    assert torch.equal(attacked["keep"], attacked["train"])
    assert not torch.equal(attacked["eval"], attacked["train"])
    model.eval()
    assert torch.equal(fgm(model, x, y, eps=0.5, model_mode="keep"), attacked["eval"])


def test_an_overridden_train_method_is_respected_and_not_called_to_restore() -> None:
    class Backbone(nn.Sequential):
        calls = 0

        def train(self, mode: bool = True):
            self.calls += 1
            super().train(mode)
            self[1].eval()
            return self

    model = Backbone(*conv_net())
    seen = []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    calls = model.calls
    fgm(model, *samples(), eps=0.1, model_mode="train")
    assert seen == [False]
    assert model.calls == calls + 1


def test_a_buffer_replaced_in_the_forward_is_put_back() -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(()))
            self.register_buffer("cache", None)
            self.fc = nn.Linear(192, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()
            return self.fc(x.flatten(1) - self.average)

    model = Averaging()
    state = State(model)
    pgd(model, *samples(), eps=0.3, steps=2)
    state.assert_unchanged()


def test_only_changed_buffers_are_written() -> None:
    """A write bumps the version, which others watch."""
    model = conv_net()
    versions = [b._version for b in model.buffers()]
    pgd(model, *samples(), eps=0.3, steps=2)
    assert [b._version for b in model.buffers()] == versions


def test_lazy_modules_may_be_attacked_first() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(CLASSES))
    pgd(model, *samples(), eps=0.3, steps=2)
    assert model(samples()[0]).shape == (6, CLASSES)


def test_a_model_that_works_in_place_cannot_reach_the_input() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, CLASSES))
    x, y = samples()
    x -= 0.5
    before = x.clone()
    with pytest.raises(RuntimeError, match="in-place"):
        pgd(model, x, y, eps=0.3)
    copy, _ = pgd(model, x, y, eps=0.0, return_info=True)
    assert same_bits(x, before)
    assert same_bits(copy, before)
    moved = pgd(model, x, y, eps=0.3, mean=0.1)  # the model is given x - mean, which it may overwrite
    assert same_bits(x, before)
    assert not torch.equal(moved, x)


def test_without_a_module_there_is_nothing_to_guard() -> None:
    weight = torch.randn(192, CLASSES)
    x, y = samples()
    assert not torch.equal(pgd(lambda z: z.flatten(1) @ weight, x, y, eps=0.2, model_mode="train"), x)


# -- spectral normalisation -------------------------------------------------------------------------------------------


def normalised_net() -> nn.Sequential:
    model = conv_net()
    return spectral.apply_spectral_norm(model, torch.zeros(1, 3, 8, 8))


@every_attack
@pytest.mark.parametrize("freeze_sn", [True, False])
def test_sigmas_do_not_move(attack: Attack, freeze_sn: bool) -> None:
    model = normalised_net()
    model(samples()[0])
    state = State(model)
    attack(model, *samples(), freeze_sn=freeze_sn, model_mode="train")
    state.assert_unchanged()


@pytest.mark.parametrize("freeze_sn", [True, False])
def test_sigma_still_follows_a_weight_that_moved_before_the_attack(freeze_sn: bool) -> None:
    """Whoever uses a moved weight first refreshes its sigma: undoing that would leave a stale one."""
    model = normalised_net()
    x, y = samples()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    pgd(model, x, y, eps=0.2, steps=2, freeze_sn=freeze_sn)
    after = spectral.sigmas(model)
    for module, sigma in zip((m for m in model if hasattr(m, "parametrizations")), after.values(), strict=True):
        size = {3: (8, 8), 6: (8, 8)}.get(getattr(module, "in_channels", None))
        exact = operator_norm(operator_of(module, size, raw=True))
        assert sigma == pytest.approx(float(exact), rel=0.02)


def test_freezing_changes_the_work_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = normalised_net()
    x, y = samples()
    model(x)
    computed = 0
    normalize = spectral.parametrization.SpectralNorm.normalize

    def counted(*args):
        nonlocal computed
        computed += 1
        return normalize(*args)

    monkeypatch.setattr(spectral.parametrization.SpectralNorm, "normalize", counted)
    results, counts = [], []
    for freeze_sn in (True, False):
        computed = 0
        results.append(pgd(model, x, y, eps=0.3, steps=4, freeze_sn=freeze_sn))
        counts.append(computed)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    assert counts == [3, 12]


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({}, 5),
        ({"y": None}, 5),  # labels come with the first gradient
        ({"y": None, "random_start": True}, 6),
        ({"return_info": True}, 6),
        ({"keep_best": True}, 6),
        ({"random_start": True, "restarts": 3}, 18),
    ],
)
def test_number_of_forwards(options: dict, forwards: int) -> None:
    model = Recorder(conv_net().eval())
    x, y = samples()
    pgd(model, x, options.pop("y", y), eps=0.3, steps=5, **options)
    assert len(model.inputs) == forwards


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::masked_select",
            "aten::is_nonzero",
        ), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L1-exact"])
def test_nothing_waits_for_the_device(norm: str) -> None:
    """But for what is read of the arguments before the first forward: test_ranges.py."""
    model = conv_net(batch_norm=False)
    x, y = samples()
    with NoWaiting():
        pgd(
            model,
            x,
            y,
            norm=norm,
            eps=0.3,
            steps=2,
            clip=(0, 1),
            mean=0.5,
            std=0.2,
            random_start=True,
            restarts=2,
            early_stop=True,
            keep_best=True,
            return_info=True,
        )
        fgm(model, x, norm=norm, eps=0.3)
        wrm(model, x, y, eps=0.3, steps=2)
        random_start(x, norm=norm, eps=torch.full((6,), math.pi))
