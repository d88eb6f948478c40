"""Tables ``updates`` and ``attacks``: an attack between two gradients, and whole attacks beside the peers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.attacks import pgd, pgd_step, wrm_step
from sn_fast.experiments import load_data
from sn_fast.inspection.timing import paired
from sn_fast.ops import steps
from sn_fast.reference.pgd_step import box

from .. import eager_updates as eager
from ..models import resnet18
from .data import missing, why_failed

_EPS = {"l_inf": 8 / 255, "l2": 0.5, "l1": 12.0, "wrm": 0.5}
_ALPHA = {"l_inf": 2 / 255, "l2": 0.1, "l1": 3.0, "wrm": 0.1}
_NORMS: dict[str, float] = {"l_inf": math.inf, "l2": 2, "l1": 1}
_EAGER = {"l_inf": eager.linf, "l2": eager.l2, "l1": eager.l1, "wrm": eager.wrm}
_BATCHES = {"8x3x32x32": (8, 32), "64x3x32x32": (64, 32), "512x3x32x32": (512, 32), "16x3x224x224": (16, 224)}
_STEPS = 10


def update_rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    names = list(_BATCHES)[:2] if quick else _BATCHES
    return {f"{kind}, {name}": partial(_update, kind, *_BATCHES[name], quick) for kind in _EAGER for name in names}


def _update(kind: str, batch: int, size: int, quick: bool) -> dict[str, Any]:
    """Both ways through ten steps, as in an attack; first against the same step in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, size, size, generator=generator)
    scale = math.sqrt(1024) / size  # of the perturbation, so that it is near the sphere for every size
    start = (x + 0.02 * scale * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    grad = 1e-3 * torch.randn(x.shape, generator=generator)
    eps, alpha = _EPS[kind], _ALPHA[kind]

    def plain(x_adv: Tensor) -> Tensor:
        return _EAGER[kind](x_adv, x.to(x_adv.dtype), grad.to(x_adv.dtype), eps, alpha)

    def ours(x_adv: Tensor) -> Tensor:
        if kind == "wrm":
            return wrm_step(x_adv, x, grad, eps=eps, step=alpha)
        return pgd_step(x_adv, x, grad, norm=_NORMS[kind], eps=eps, alpha=alpha, clip=(0, 1))

    ways = {"operations one by one": plain, "sn_fast": ours}
    if kind == "l_inf":  # ball and clip do not change from step to step: an attack makes one box of them
        low, high = box(x, eps, None, 0.0, 1.0)
        numbers = (math.inf, alpha, None, None)
        ways["sn_fast, within pgd"] = lambda x_adv: steps.pgd_step(
            x_adv, x, grad, "inf", *numbers, low, high, targeted=False, active=None
        )
    true = plain(start.double())
    errors = {name: float((way(start).double() - true).abs().max()) for name, way in ways.items()}

    def ten(way: Callable[[Tensor], Tensor]) -> None:
        x_adv = start
        for _ in range(_STEPS):
            x_adv = way(x_adv)

    times = paired(
        {n: partial(ten, w) for n, w in ways.items()}, turns=5 if quick else 41, budget=0.3 if quick else 2.5
    )
    return {"steps": _STEPS, "methods": {n: {"largest_error": float(f"{errors[n]:.2g}")} | times[n] for n in ways}}


# -- whole attacks ----------------------------------------------------------------------------------------------------


def attack_rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    found: dict[str, Callable[[], Mapping[str, Any]]] = {}
    for name, make in {"digits, small CNN, batch 128": _digits, "ResNet-18 a quarter wide, batch 8": _resnet}.items():
        for kind in ("l_inf", "l2"):
            found[f"PGD-{_STEPS} {kind}, {name}"] = partial(_attack, kind, make, quick)
    return found


def _digits() -> tuple[nn.Module, Tensor, Tensor, dict[str, float]]:
    """A network trained on the 8 x 8 digits, some test images, and radii at which some attacks fail."""
    split = load_data("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 10)),
        )
        x, y = (t.detach() for t in (split.train.x, split.train.y))
        low, high = float(x.min()), float(x.max())
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model((x[rows] - low) / (high - low)), y[rows]).backward()
            optimizer.step()
    return model.eval(), (split.test.x[:128] - low) / (high - low), split.test.y[:128], {"l_inf": 0.12, "l2": 0.8}


def _resnet() -> tuple[nn.Module, Tensor, Tensor, dict[str, float]]:
    """A network of usual size with its first weights, and its own decisions as labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18(16).eval()
        x = torch.rand(8, 3, 32, 32)
    return model, x, model(x).argmax(dim=1), {"l_inf": 16 / 255, "l2": 2.0}


def _attack(
    kind: str, make: Callable[[], tuple[nn.Module, Tensor, Tensor, dict[str, float]]], quick: bool
) -> dict[str, Any]:
    """The same attack by each package: as many gradients from the same start with the same steps."""
    model, x, y, radii = make()
    eps = radii[kind]
    alpha = 2 * eps / _STEPS
    cells: dict[str, Any] = {}
    ways: dict[str, Callable[[], Tensor]] = {}
    makers = {"sn_fast": _sn_fast, "torchattacks": _torchattacks, "foolbox": _foolbox}
    for name, maker in makers.items():
        if name != "sn_fast" and (how := missing(name)):
            cells[name] = {"missing": how}
            continue
        try:
            ways[name] = maker(model, x, y, kind, eps, alpha)
            x_adv = ways[name]().detach()
        except Exception as error:
            ways.pop(name, None)
            cells[name] = why_failed(error)
            continue
        if name == "sn_fast":
            reference = x_adv
        with torch.no_grad():
            fooled = float((model(x_adv).argmax(dim=1) != y).float().mean())
        difference = float((x_adv - reference).abs().max())
        cells[name] = {"success": round(fooled, 4), "differs_by": float(f"{difference:.2g}")}
    for name, t in paired(ways, turns=3 if quick else 9, budget=0.5 if quick else 6.0).items():
        cells[name] |= t
    return {"eps": round(eps, 5), "steps": _STEPS, "methods": {name: cells[name] for name in makers}}


def _sn_fast(model: nn.Module, x: Tensor, y: Tensor, kind: str, eps: float, alpha: float) -> Callable[[], Tensor]:
    return partial(pgd, model, x, y, norm=_NORMS[kind], eps=eps, alpha=alpha, steps=_STEPS, clip=(0, 1))


def _torchattacks(model: nn.Module, x: Tensor, y: Tensor, kind: str, eps: float, alpha: float) -> Callable[[], Tensor]:
    import torchattacks

    make = torchattacks.PGD if kind == "l_inf" else torchattacks.PGDL2
    attack = make(model, eps=eps, alpha=alpha, steps=_STEPS, random_start=False)
    return lambda: attack(x, y)


def _foolbox(model: nn.Module, x: Tensor, y: Tensor, kind: str, eps: float, alpha: float) -> Callable[[], Tensor]:
    import foolbox

    make = foolbox.attacks.LinfPGD if kind == "l_inf" else foolbox.attacks.L2PGD
    attack = make(abs_stepsize=alpha, steps=_STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    return lambda: attack(wrapped, x, y, epsilons=eps)[1]
