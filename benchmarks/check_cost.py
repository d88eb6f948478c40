"""What it costs to see that no weight has changed: the check of a forward beside the forward, on one CPU thread.

``python -m benchmarks.check_cost [--json FILE]``: ResNet-18 for 32 x 32 images, all layers normalised. Each figure is
the least of several runs taken in turns, so that ratios hold on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.normalization.hooks import after_forward, before_forward

from .models import NETWORKS


def least(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each function, the least of ``rounds`` taken in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def measured(rounds: int) -> dict[str, object]:
    """Milliseconds: a check without a change, and all that a check can be beside."""
    torch.manual_seed(0)
    described = NETWORKS["ResNet-18, 32x32"]
    model = sn_fast.apply_spectral_norm(described.make(), described.example()).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    small, large = described.example(1), described.example(32)

    def check() -> None:
        before_forward(model, ())
        after_forward(model, (), None)

    def evaluate(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(large), torch.zeros(len(large), dtype=torch.long)).backward()
        optimizer.step()

    def check_without_gradients() -> None:
        with torch.no_grad():
            check()

    def rewrite() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0001)

    functions: dict[str, Callable[[], object]] = {
        "check": check_without_gradients,
        "check, with vectors for a backward": check,
        "eval forward, batch 1": lambda: evaluate(small),
        "eval forward, batch 32": lambda: evaluate(large),
    }
    times = least(functions, rounds)
    changed: dict[str, Callable[[], object]] = {"rewrite": rewrite, "check and refresh after a change": check}
    times["check and refresh after a change"] = least(changed, rounds)["check and refresh after a change"]
    model.train()
    times["training step, batch 32"] = least({"step": step}, max(3, rounds // 4))["step"]
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    return {"torch": torch.__version__, "weights": weights, "milliseconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="number of runs of each function (default: %(default)s)")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(options.rounds)
    times = found["milliseconds"]
    assert isinstance(times, dict)
    for name, value in times.items():
        print(f"{name:45s} {value:9.2f} ms")
    for what, beside in (
        ("check", "eval forward, batch 1"),
        ("check", "eval forward, batch 32"),
        ("check, with vectors for a backward", "training step, batch 32"),
    ):
        print(f"{what} / {beside}: {100 * times[what] / times[beside]:.2f} %")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
