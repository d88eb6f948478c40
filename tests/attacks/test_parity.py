"""The published outputs, and the attacks of other libraries."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.attacks import fgm, pgd, project, wrm
from sn_fast.attacks.gradient import prepared

from ..on_device import DEVICE
from .models import conv_net, samples

X_ADV_TOLERANCE = 1e-4  # manifest.json: suggested_tolerances.x_adv_abs
NAME = re.compile(
    r"adv_(?P<method>fgm|pgm|wrm)_(?P<norm>l1|l2|linf|na)_eps(?P<eps>[\d.]+)_k(?P<k>None|\d+)_(?P<labels>y|pred)"
    r"(?:_a(?P<a>[\d.]+))?(?P<clip>_clip_min0_clip_max1)?"
)
FAMILIES = [*(f"{m}_{n}" for m in ("fgm", "pgm") for n in ("l1", "l2", "linf")), "wrm_na"]


def nchw(a) -> Tensor:
    return torch.from_numpy(a).permute(0, 3, 1, 2).contiguous()


class PublishedNet(nn.Module):
    """Two SAME convolutions and a linear layer; TensorFlow pads 12 -> 6 by 0 before and 1 after, and flattens NHWC."""

    def __init__(self, arrays) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(288, 5)
        with torch.no_grad():
            for name, layer in self.named_children():
                weight = torch.from_numpy(arrays[f"{name}.weights"])
                layer.weight.copy_(weight.permute(3, 2, 0, 1) if weight.dim() == 4 else weight.T)
                layer.bias.copy_(torch.from_numpy(arrays[f"{name}.bias"]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.conv1(x))
        x = F.elu(self.conv2(F.pad(x, (0, 1, 0, 1))))
        return self.fc(x.permute(0, 2, 3, 1).flatten(1))


@pytest.fixture(scope="module")
def attacked(published):
    arrays = published("attack_noSN_c1.npz")
    return arrays, PublishedNet(arrays), nchw(arrays["x"])


def test_published_logits_losses_and_gradients(attacked) -> None:
    arrays, net, x = attacked
    torch.testing.assert_close(net(x), torch.from_numpy(arrays["logits"]), rtol=0, atol=1e-5)
    for labels in ("y", "pred"):
        y = torch.from_numpy(arrays["y"]).long() if labels == "y" else None
        with prepared(net, x, y, "ce", False, None, None, "eval", True, None) as (x, objective):
            gradient, evaluation = objective.gradient(x)
        assert objective.y.tolist() == arrays[labels].tolist()
        assert not any(t.requires_grad for t in (gradient, *evaluation))
        torch.testing.assert_close(evaluation.losses, torch.from_numpy(arrays[f"loss_{labels}"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, nchw(arrays[f"grad_{labels}"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_attacks(attacked, family: str) -> None:
    arrays, net, x = attacked
    labels = torch.from_numpy(arrays["y"]).long()
    names = [name for name in arrays if name.startswith(f"adv_{family}_")]
    assert len(names) >= 6
    for name in names:
        match = NAME.fullmatch(name)
        assert match is not None, name
        y = labels if match["labels"] == "y" else None
        eps = float(match["eps"])
        if match["method"] == "wrm":
            x_adv = wrm(net, x, y, eps=eps, steps=int(match["k"]))
        elif match["method"] == "fgm":
            x_adv = fgm(net, x, y, norm=match["norm"], eps=eps, clip=(0, 1) if match["clip"] else None)
        else:
            alpha = None if match["a"] is None else float(match["a"])
            x_adv = pgd(net, x, y, norm=match["norm"], eps=eps, steps=int(match["k"]), alpha=alpha)
        torch.testing.assert_close(
            x_adv, nchw(arrays[name]), rtol=0, atol=X_ADV_TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_every_published_attack_is_covered(attacked) -> None:
    names = {name for name in attacked[0] if name.startswith("adv_")}
    assert names == {name for name in names if any(name.startswith(f"adv_{f}_") for f in FAMILIES)}
    assert len(names) == 94


def test_published_projections(published) -> None:
    arrays = published("projection.npz")
    x, x_adv = nchw(arrays["x"]), nchw(arrays["x_adv"])
    names = [name for name in arrays if name.startswith("proj_")]
    assert len(names) == 8
    for name in names:
        _, norm, eps = name.split("_")
        p = project(x_adv, x, norm=norm, eps=float(eps.removeprefix("eps")))
        torch.testing.assert_close(p, nchw(arrays[name]), rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- other libraries, on inputs so far inside [0, 1] that their clipping never acts -----------------------------------

LINF = {"eps": 0.06, "alpha": 0.013, "steps": 8}
L2 = {"eps": 0.5, "alpha": 0.11, "steps": 8}


@pytest.fixture
def peer() -> tuple[nn.Module, Tensor, Tensor]:
    return conv_net().eval(), *samples(8)  # a power of two: dividing a loss by it changes no sign by rounding


def test_torchattacks(peer) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = peer
    linf = torchattacks.PGD(model, **LINF, random_start=False)(x, y)
    assert torch.equal(pgd(model, x, y, norm="Linf", **LINF), linf)
    l2 = torchattacks.PGDL2(model, **L2, random_start=False)(x, y)
    torch.testing.assert_close(pgd(model, x, y, norm="L2", **L2), l2, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        fgm(model, x, y, norm="Linf", eps=0.06), torchattacks.FGSM(model, eps=0.06)(x, y), rtol=0, atol=1e-7
    )


def test_foolbox(peer) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, x, y = peer
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)

    def run(attack, eps: float) -> Tensor:
        return attack.run(theirs, x, y, epsilon=eps)

    def schedule(options: dict) -> dict:
        return {"abs_stepsize": options["alpha"], "steps": options["steps"], "random_start": False}

    linf = run(foolbox.attacks.LinfPGD(**schedule(LINF)), LINF["eps"])
    torch.testing.assert_close(pgd(model, x, y, norm="Linf", **LINF), linf, rtol=0, atol=1e-7)
    l2 = run(foolbox.attacks.L2PGD(**schedule(L2)), L2["eps"])
    torch.testing.assert_close(pgd(model, x, y, norm="L2", **L2), l2, rtol=0, atol=1e-6)
    one = run(foolbox.attacks.FGM(), 0.4)
    torch.testing.assert_close(fgm(model, x, y, norm="L2", eps=0.4), one, rtol=0, atol=1e-6)
