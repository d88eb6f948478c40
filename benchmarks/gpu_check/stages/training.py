"""One step of adversarial training of ResNet-18, and what spectral normalisation adds to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import pgd

from ... import models
from ..context import Context
from ..kernels import serve
from ..timing import Timer, ratio

_BATCH, _STEPS = 256, 10


def run(context: Context) -> None:
    """PGD-10, l_inf, bf16 autocast; in both memory formats."""
    serve(context)
    for name, layout in {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}.items():
        if context.has_time(name, 12.0):
            context.attempt(name, lambda n=name, f=layout: _format(context, n, f))  # type: ignore[misc]
        if context.rehearse:
            return


def _format(context: Context, name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = next(iter(context.pick(models.NETWORKS, models.TINY).values()))
    batch, steps = context.pick((_BATCH, _STEPS), (4, 2))
    timer = Timer(context.device, context.pick(8, 2))
    plain = network.make().to(context.device, memory_format=layout)
    x = torch.rand(batch, 3, *network.input_size, device=context.device).contiguous(memory_format=layout)
    y = torch.randint(10, (batch,), device=context.device)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    sn_fast.apply_spectral_norm(ours, x[:1])
    for m in [m for m in theirs.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        nn.utils.parametrizations.spectral_norm(m)

    def trainer(model: nn.Module, **options: Any) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

        def step() -> Tensor:
            model.train()
            attack: dict[str, Any] = {"norm": "inf", "eps": 8 / 255, "steps": steps, "clip": (0, 1)} | options
            x_adv = pgd(model, x, y, autocast_dtype=torch.bfloat16, **attack)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(context.device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x_adv), y)
            loss.backward()
            optimizer.step()
            return loss

        return step

    actions = {"plain": trainer(plain), "sn_fast": trainer(ours), "torch": trainer(theirs)}
    took = timer.on_host(actions)
    entry: dict[str, Any] = {"step": took, "batch": batch, "steps": steps}
    entry |= {f"{n}_times_plain": ratio(took[n], took["plain"]) for n in ("sn_fast", "torch")}
    # A share of one per cent is smaller than the spread of whole steps: the refresh by itself says more.
    refresh = Timer(context.device, context.repeats).on_host({"refresh": lambda: sn_fast.update_spectral_norm(ours)})
    entry["refresh"] = refresh["refresh"]
    entry["refresh_share"] = ratio(refresh["refresh"], took["sn_fast"])
    context.record(name, entry)
    milliseconds = ", ".join(f"{n} {t['median'] / 1000:.1f} ms" for n, t in took.items())
    print(f"{name}: {milliseconds}; refresh {entry['refresh_share']:.2%} of a step", flush=True)
    if context.rehearse or context.has_time(f"{name}, cuda_graph", 6.0):
        entry["cuda_graph"] = _graphed(context, trainer(ours, cuda_graph=True), timer, took["sn_fast"])
        context.record(name, entry)


def _graphed(context: Context, step: Callable[[], Tensor], timer: Timer, eager: dict[str, float]) -> Any:
    """The step with the attack's loop as one CUDA graph."""
    try:
        step()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        print(f"pgd(cuda_graph=True): {type(error).__name__}: {error}", flush=True)
        return f"not measured: {type(error).__name__}: {str(error)[:300]}"
    took = timer.on_host({"graph": step})["graph"]
    return {"step": took, "eager_times_graph": ratio(eager, took)}
