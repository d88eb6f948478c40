"""Runs the main kernels in full size: the program that the profiler watches, from ``start`` to ``stop``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn_fast
from sn_fast.attacks import pgd_step
from sn_fast.ops.power_step import power_step

from .. import models
from .roofline import layers, power_arguments, used_weights


def main() -> None:
    """Everything once to warm up, so that plans are made and libraries loaded; then once more, which is what counts."""
    parser = argparse.ArgumentParser("gpu_check.profiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    todo = list(actions(options.device, options.small))
    for _, action in todo:
        action()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for name, action in todo:
        action()
        print(f"ran: {name}", flush=True)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def actions(device: str, small: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is profiled, by name: few launches, for each is run again for every group of counters."""
    torch.manual_seed(0)
    networks = models.TINY if small else dict(list(models.NETWORKS.items())[:2])
    for name, network in networks.items():
        model = network.make().to(device)
        sn_fast.apply_spectral_norm(model, network.example().to(device))
        found = layers(model)
        arguments = power_arguments(found)
        for precision in ("fp32", "tf32"):
            yield f"{name}, power_step, {precision}", partial(power_step, *arguments, 1, precision)
        chosen = found[1::10]  # every layer has launches of its own
        raws = [x.state.raw for x in chosen]
        grads = [torch.randn_like(r) for r in raws]
        modules = [x.module for x in chosen]

        def normalised(model: Any = model, modules: Any = modules, raws: Any = raws, grads: Any = grads) -> Any:
            return torch.autograd.grad(used_weights(model, modules), raws, grads)

        yield f"{name}, normalise", normalised
    x = torch.rand((2, 3, 8, 8) if small else (256, 3, 224, 224), device=device)
    x_adv, grad = (x + 0.05 * torch.randn_like(x)).clamp_(0, 1), torch.randn_like(x)
    for norm in ("inf", 2):
        options: dict[str, Any] = {"norm": norm, "eps": 0.03, "alpha": 0.01, "clip": (0, 1)}
        yield f"pgd_step {norm}", partial(pgd_step, x_adv, x, grad, **options)


if __name__ == "__main__":
    main()
