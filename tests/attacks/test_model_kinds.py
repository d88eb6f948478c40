"""Exported, scripted, traced and frozen models, and models that stop the gradient on its way to x."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_fast.attacks import fgm, pgd, wrm

from .models import CLASSES, same_bits, samples

ATTACKS: tuple[Callable[..., Any], ...] = (
    lambda *args, **kw: pgd(*args, **{"eps": 0.3, "steps": 2, **kw}),
    lambda *args, **kw: fgm(*args, **{"eps": 0.3, **kw}),
    lambda *args, **kw: wrm(*args, **{"eps": 0.3, "steps": 2, **kw}),
)
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=["pgd", "fgm", "wrm"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, CLASSES)
    )
    model(samples()[0])
    return model


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch.jit says that it is deprecated; torch 2.7 counts exports as compilations of one function."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache  # an attack leaves it as it is
def exported(training: bool) -> nn.Module:
    return torch.export.export(network().train(training), (samples()[0],)).module()


@cache  # an attack leaves it as it is
def decomposed(training: bool) -> nn.Module:
    return torch.export.export(network().train(training), (samples()[0],)).run_decompositions().module()


def traced(training: bool) -> nn.Module:
    return torch.jit.trace(network().train(training), samples()[0], check_trace=False)


FIXED: dict[str, Callable[[], nn.Module]] = {  # in evaluation mode
    "exported": lambda: exported(False),
    "exported, decomposed": lambda: decomposed(False),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(network().eval())),
    "frozen trace": lambda: torch.jit.freeze(traced(False)),
    "traced": lambda: traced(False),
}
PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "alone": lambda model: model,
    "inside": lambda model: nn.Sequential(nn.Identity(), model),
}
every_fixed = pytest.mark.parametrize("make", FIXED.values(), ids=FIXED)
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


class State:
    """Attributes, buffers and flags of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {k: v.clone() for k, v in model.state_dict().items()}
        self.flags = [getattr(m, "training", None) for m in model.modules()]
        self.attributes = self.names()

    def names(self) -> list[set[str]]:
        return [set(vars(m)) - {"forward"} for m in self.model.modules()]  # which scripts keep after a call

    def assert_unchanged(self) -> None:
        assert all(same_bits(v, self.tensors[k]) for k, v in self.model.state_dict().items() if v.is_floating_point())
        assert [getattr(m, "training", None) for m in self.model.modules()] == self.flags
        assert self.names() == self.attributes


@every_fixed
@every_place
@every_attack
@pytest.mark.parametrize("mode", ["eval", "keep"])
def test_models_made_in_evaluation_mode(attack, place, make, mode: str) -> None:
    model, (x, y) = place(make()), samples()
    state = State(model)
    x_adv, info = attack(model, x, y, model_mode=mode, return_info=True)
    wanted, other = attack(network().eval(), x, y, return_info=True)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-5)
    assert torch.equal(info.success, other.success)
    state.assert_unchanged()


@every_fixed
@every_place
@every_attack
def test_they_cannot_be_attacked_in_training(attack, place, make) -> None:
    model = place(make())
    state = State(model)
    with pytest.raises(ValueError, match=r"model_mode='train': .* in evaluation mode, .* pass model_mode='keep'"):
        attack(model, *samples(), model_mode="train")
    state.assert_unchanged()


@every_place
@every_attack
@pytest.mark.parametrize("make", [exported, traced])
def test_models_made_in_training_mode(attack, place, make) -> None:
    """Dropout and batch statistics are in their code, whatever their flags say."""
    model, (x, y) = place(make(True)), samples()
    state = State(model)
    with pytest.raises(ValueError, match=r"model_mode='eval': .* in training mode, .* pass model_mode='keep'"):
        attack(model, x, y)
    for mode in ("train", "keep"):
        assert (attack(model, x, y, model_mode=mode) != x).flatten(1).any(dim=1).all()
    state.assert_unchanged()


@every_attack
def test_a_model_that_writes_what_its_gradient_needs(attack) -> None:
    """Decomposed batch norm in training mode."""
    for mode in ("train", "keep"):
        with pytest.raises(ValueError, match=r"gradient in x cannot be taken .* with model.eval\(\)"):
            attack(decomposed(True), *samples(), model_mode=mode)


@every_attack
def test_scripts_have_both_modes(attack) -> None:
    model, (x, y) = torch.jit.script(network()), samples()
    state = State(model)
    torch.testing.assert_close(attack(model, x, y), attack(network().eval(), x, y), rtol=0, atol=1e-5)
    torch.manual_seed(1)
    found = attack(model, x, y, model_mode="train")
    assert not torch.equal(found, attack(model, x, y))
    state.assert_unchanged()


class Stubborn(nn.Sequential):
    """A model that cannot be set to a mode."""

    def train(self, mode: bool = True) -> Stubborn:
        raise NotImplementedError("not here")


@every_attack
def test_models_that_cannot_be_set_to_a_mode(attack) -> None:
    model, (x, y) = Stubborn(*network()), samples()
    with pytest.raises(ValueError, match=r"model_mode='eval': .* \(NotImplementedError: not here\); .*'keep'"):
        attack(model, x, y)
    assert all(m.training for m in model.modules())
    attack(model, x, y, model_mode="keep")
    for m in model.modules():
        m.training = False
    torch.testing.assert_close(attack(model, x, y), attack(network().eval(), x, y))


# -- gradients that do not reach x ------------------------------------------------------------------------------------


class Probe(nn.Module):
    """A head on a backbone that is run without gradients."""

    def __init__(self, without: Callable[..., Any], frozen: bool = False) -> None:
        super().__init__()
        self.without = without
        self.backbone, self.head = nn.Linear(192, 16), nn.Linear(16, CLASSES)
        if frozen:
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with self.without():
            features = self.backbone(x.flatten(1)).tanh()
        return self.head(features)


class Detached(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x.flatten(1)).detach())


class ThroughNumpy(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.from_numpy(self.backbone(x.flatten(1)).numpy()))


class Rounded(Probe):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone((255 * x.flatten(1)).to(torch.uint8).float()))


NO_PATH: dict[str, Callable[[], Any]] = {
    "no_grad backbone": lambda: Probe(torch.no_grad),
    "all frozen too": lambda: Probe(torch.no_grad, frozen=True),
    "inference_mode backbone": lambda: Probe(torch.inference_mode),
    "inference_mode, all frozen": lambda: Probe(torch.inference_mode, frozen=True),
    "inside a model": lambda: nn.Sequential(nn.Identity(), Probe(torch.no_grad), nn.Tanh()),
    "detached": lambda: Detached(torch.no_grad),
    "through numpy": lambda: ThroughNumpy(torch.no_grad),
    "rounded input": lambda: Rounded(torch.no_grad),
    "scripted": lambda: torch.jit.script(Constant()),
    "decorated": lambda: torch.no_grad()(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))),
    "exported": lambda: torch.export.export(Probe(torch.no_grad), (samples()[0],)).module(),
    "optimized for inference": lambda: torch.jit.optimize_for_inference(torch.jit.script(network().eval())),
}


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(x.shape[0], 5)


@pytest.mark.parametrize("name", NO_PATH)
@every_attack
def test_a_loss_without_a_gradient_in_x(attack, name: str) -> None:
    model, (x, y) = NO_PATH[name](), samples()
    for options in ({}, {"loss": lambda logits, y: logits.square().sum(dim=1)}):
        with pytest.raises(
            ValueError, match=r"does not depend on x in a way autograd can follow.*requires_grad_\(False\) instead"
        ):
            attack(model, x, y, **options)
    if isinstance(model, nn.Module):
        assert all(p.grad is None for p in model.parameters())
        assert getattr(model, "training", True)


@every_attack
def test_weights_frozen_as_the_message_says(attack) -> None:
    from contextlib import nullcontext

    model, (x, y) = Probe(nullcontext, frozen=True), samples()
    assert (attack(model, x, y) != x).flatten(1).any(dim=1).all()


def test_errors_of_the_model_itself_are_not_renamed() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        pgd(fail, *samples(), eps=0.1)
