"""Runs the main kernels once each in full size: the program that the profiler watches."""

from __future__ import annotations

import argparse

import torch

import sn_fast
from sn_fast.attacks import pgd_step
from sn_fast.ops.power_step import power_step

from .. import models
from .roofline import layers, power_arguments, used_weights


def main() -> None:
    """Warm-up, so that plans are made and caches filled as in a loop; then once more, which is what counts."""
    parser = argparse.ArgumentParser("gpu_check.profiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = options.device
    torch.manual_seed(0)
    networks = models.TINY if options.small else dict(list(models.NETWORKS.items())[:2])
    for name, network in networks.items():
        model = network.make().to(device)
        sn_fast.apply_spectral_norm(model, network.example().to(device))
        arguments = power_arguments(layers(model))
        for precision in ("fp32", "tf32"):
            power_step(*arguments, 1, precision)
        weights = used_weights(x.module for x in layers(model)[1::10])  # a few: every layer has a launch of its own
        torch.autograd.backward(weights, [torch.randn_like(w) for w in weights])
        print(f"ran: {name}", flush=True)
    size = (2, 3, 8, 8) if options.small else (256, 3, 224, 224)
    x = torch.rand(size, device=device)
    x_adv, grad = (x + 0.05 * torch.randn_like(x)).clamp_(0, 1), torch.randn_like(x)
    for norm in ("inf", 2):
        pgd_step(x_adv, x, grad, norm=norm, eps=0.03, alpha=0.01, clip=(0, 1))
        print(f"ran: pgd_step {norm}", flush=True)


if __name__ == "__main__":
    main()
