"""The attacks' updates: bandwidth against a copy of the same size in the same loop, and against eager operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sn_fast.attacks import pgd_step, project, random_start, wrm_step
from sn_fast.ops.update_arguments import RESIDENT_BYTES
from sn_fast.reference import pgd_step as pgd_reference
from sn_fast.reference import wrm_step as wrm_reference

from ... import eager_updates
from ..context import Context
from ..kernels import serve
from ..timing import Timer, ratio

# The first two are larger than any cache, with samples that fit on chip and that do not; then batches as in training.
SIZES = {
    "large, 3x32x32": (24576, 3, 32, 32),
    "large, 3x224x224": (512, 3, 224, 224),
    "CIFAR, 128x3x32x32": (128, 3, 32, 32),
    "ImageNet, 256x3x224x224": (256, 3, 224, 224),
}
TINY = {"large, tiny": (4, 3, 8, 8), "CIFAR, tiny": (2, 3, 8, 8)}
_EPS = {"inf": 8 / 255, 2: 0.5, 1: 10.0, "L1-exact": 10.0}
_IN_CACHE = 16 << 20  # bytes of a batch below which all of it stays in the L2 cache


@dataclass
class Update:
    """One update: by sn_fast, by its reference, by eager operations; ``passes`` over a full-size tensor."""

    name: str
    ours: Callable[[], Any]
    reference: Callable[[], Any]
    eager: Callable[[], Any] | None
    passes: int | None  # None: not known beforehand


def updates(x: Tensor) -> Iterator[Update]:
    """All updates of a batch in [0, 1], most of whose samples leave the ball."""
    x_adv = (x + 0.05 * torch.randn_like(x)).clamp_(0, 1)
    grad = torch.randn_like(x)
    lower, upper = torch.zeros((), device=x.device), torch.ones((), device=x.device)
    clip = (0.0, 1.0)
    rest = (None, None, lower, upper, False, None)
    # Where a sample does not fit on chip, its sums take a launch and passes of their own (csrc/attacks/pgd_step.cuh).
    sample = math.prod(x.shape[1:]) * x.element_size()
    step_fits, project_fits = 3 * sample <= RESIDENT_BYTES - 1024, 2 * sample <= RESIDENT_BYTES - 1024
    step_passes = {"inf": 4, 2: 4 if step_fits else 7, 1: 4 if step_fits else 8, "L1-exact": 4 if step_fits else None}
    project_passes = {
        "inf": 3,
        2: 3 if project_fits else 5,
        1: 3 if project_fits else 5,
        "L1-exact": 3 if project_fits else None,
    }
    eagerly = {"inf": eager_updates.linf, 2: eager_updates.l2, 1: eager_updates.l1}
    for norm, eps in _EPS.items():
        alpha, plain = eps / 4, str(norm).removeprefix("L").lower()
        options: dict[str, Any] = {"norm": norm, "eps": eps, "clip": clip}
        yield Update(
            f"pgd_step {norm}",
            lambda o=options, a=alpha: pgd_step(x_adv, x, grad, alpha=a, **o),  # type: ignore[misc]
            lambda n=plain, e=eps, a=alpha: pgd_reference.pgd_step(x_adv, x, grad, n, e, a, *rest),  # type: ignore[misc]
            (lambda f=eagerly[norm], e=eps, a=alpha: f(x_adv, x, grad, e, a)) if norm in eagerly else None,  # type: ignore[misc]
            step_passes[norm],
        )
        yield Update(
            f"project {norm}",
            lambda o=options: project(x_adv, x, **o),  # type: ignore[misc]
            lambda n=plain, e=eps: pgd_reference.project(x_adv, x, n, e, None, lower, upper),  # type: ignore[misc]
            None,
            project_passes[norm],
        )
    yield Update(
        "wrm_step",
        lambda: wrm_step(x_adv, x, grad, eps=0.1, step=0.5),
        lambda: wrm_reference.wrm_step(x_adv, x, grad, 0.1, None, 0.5, None, None),
        lambda: eager_updates.wrm(x_adv, x, grad, 0.1, 0.5),
        4,
    )
    for norm in ("inf", 2):
        eps = _EPS[norm]
        yield Update(
            f"random_start {norm}",
            lambda n=norm, e=eps: random_start(x, norm=n, eps=e, clip=clip),  # type: ignore[misc]
            lambda e=eps: eager_updates.random_start(x, e),  # type: ignore[misc]
            (lambda e=eps: eager_updates.random_start(x, e)) if norm == "inf" else None,  # type: ignore[misc]
            2,
        )


def run(context: Context) -> None:
    """Every update in every size, float32 first."""
    serve(context)
    timer = Timer(context.device, context.repeats)
    for dtype in (torch.float32, torch.bfloat16):
        for size, shape in context.pick(SIZES, TINY).items():
            label = f"{size}/{str(dtype).removeprefix('torch.')}"
            if context.has_time(label, 5.0):
                context.attempt(label, lambda s=shape, d=dtype, n=label: _size(context, timer, s, d, n))  # type: ignore[misc]


def _size(context: Context, timer: Timer, shape: tuple[int, ...], dtype: torch.dtype, label: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape, device=context.device).to(dtype)
    target = torch.empty_like(x)
    size = x.numel() * x.element_size()
    in_cache = size < _IN_CACHE
    for update in updates(x):
        if not _agree(context, update, label):
            continue
        actions = {"sn_fast": update.ours, "copy": lambda: target.copy_(x), "reference": update.reference}
        if update.eager:
            actions["eager"] = update.eager
        entry: dict[str, Any] = {}
        if in_cache:
            # Short kernels on cached data: graphs of ten calls, for the device; and calls from the host, as an attack
            # makes them.
            graphs = {name: timer.graph(a, 10) for name, a in actions.items() if not update.name.startswith("random")}
            if graphs:
                graphed = timer.on_device(graphs, flush=False)
                entry["graph"] = {
                    n: {k: round(v / 10, 3) if k != "n" else v for k, v in t.items()} for n, t in graphed.items()
                }
            entry["time"] = timer.on_host(actions, inner=context.pick(20, 1))
        else:
            entry["time"] = timer.on_device(actions)
            copied = 2 * size / entry["time"]["copy"]["median"]
            if update.passes:
                reached = update.passes * size / entry["time"]["sn_fast"]["median"]
                entry |= {
                    "passes": update.passes,
                    "gb_per_s": round(reached / 1e3, 1),
                    "of_copy": round(reached / copied, 3),
                }
        for other in ("reference", "eager"):
            if other in actions:
                entry[f"{other}_times_sn_fast"] = ratio(entry["time"][other], entry["time"]["sn_fast"])
        context.record(f"{label}/{update.name}", entry)
    # The names are the same for every size: one line says enough.
    rows = context.results.get(label.split("/")[0], {}).get(label.split("/")[1], {})
    shown = {n: r.get("of_copy", r.get("eager_times_sn_fast")) for n, r in rows.items()}
    print(f"{label}: {', '.join(f'{n} {v}' for n, v in shown.items() if v is not None)}", flush=True)


def _agree(context: Context, update: Update, label: str) -> bool:
    """Whether sn_fast's result is the reference's, up to rounding; what is wrong is not timed."""
    found = update.ours()
    if update.name.startswith("random"):
        right = bool(torch.isfinite(found).all())
    else:
        wanted = update.reference()
        tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
        right = bool(((found.float() - wanted.float()).abs() <= tolerance).all())
    if not right:
        context.fail(f"{label}, {update.name}: differs from the reference; not timed")
    return right
