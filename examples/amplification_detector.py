"""Does the amplification of a small perturbation betray attacked inputs? And an attack that knows that it is watched?

Trains a small network on scikit-learn's digits or another data set, with and without spectral normalisation, and tells
clean from attacked test images by the gains of its layers (``sn_fast.theory.AmplificationDetector``). Each detector is
fitted on one half of the test images, with the attack that it is then tried on, and judged by the area under the ROC
curve (0.5 is chance) on the other half. The last columns are an attack that climbs the detector's score too: its area,
and the share of the images that fool the network and do not score above 95 % of the clean ones. That attack has the l2
radius eps, also in the rows of WRM, where eps is 1 / (2 gamma).

    python examples/amplification_detector.py --seeds 0 1 2
    python examples/amplification_detector.py --set mnist --data FOLDER --train-size 5000
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_fast.attacks import fgm, pgd, wrm
from sn_fast.experiments.data import Samples, load_data
from sn_fast.experiments.networks import demo_network
from sn_fast.theory import AmplificationDetector

EPS = (0.05, 0.1, 0.2)  # in units of the mean length of a training image
LENGTH = 0.01  # of the perturbation, in the same units
REJECTED = 0.05  # share of the clean images

ATTACKS: dict[str, Callable[[nn.Module, Tensor, Tensor, float], Tensor]] = {
    "FGM": lambda model, x, y, eps: fgm(model, x, y, eps=eps),
    "PGM": lambda model, x, y, eps: pgd(model, x, y, eps=eps),
    "WRM": lambda model, x, y, eps: wrm(model, x, y, eps=eps),
}


class Result(NamedTuple):
    """Of one attack: share fooled, and area under the curve; the same of the attack that knows the detector."""

    fooled: float
    auroc: float
    adaptive_auroc: float
    adaptive_success: float


def trained(train: Samples, beta: float, seed: int, epochs: int) -> nn.Module:
    model = demo_network(train.x.shape[1:], beta, seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for x, y in train.shuffled_batches(64, seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def judged(model: nn.Module, attacked: Tensor, clean: Tensor, y: Tensor, unit: float, eps: float) -> Result:
    """The detector fitted on the first half, and tried on the second."""
    half = len(y) // 2
    detector = AmplificationDetector(model, length=LENGTH * unit).fit(clean[:half], attacked[:half])
    clean, attacked, y = clean[half:], attacked[half:], y[half:]
    adaptive = detector.attack(clean, y, eps=eps, steps=20)
    limit = detector.score(clean).quantile(1 - REJECTED)
    with torch.no_grad():
        fooled = (model(attacked).argmax(dim=1) != y).double().mean()
        hidden = (model(adaptive).argmax(dim=1) != y) & (detector.score(adaptive) <= limit)
    areas = detector.auroc(clean, attacked), detector.auroc(clean, adaptive)
    return Result(float(fooled), *areas, float(hidden.double().mean()))


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="+", default=[float("inf"), 2.0], help="caps of the layers' norms")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--set", default="digits", help="a data set of sn_fast.experiments.load_data, e.g. mnist")
    parser.add_argument("--data", help="folder of its official files; digits and mnist5k need none")
    parser.add_argument("--train-size", type=int, default=900)
    parser.add_argument("--test-size", type=int, default=400, help="test images; half of them fit the detector")
    parser.add_argument("--csv", type=Path, help="file for the numbers of every seed")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[tuple[object, ...]] = [("network", "attack", "eps", "seed", *Result._fields)]
    print(f"{'network':12} {'attack':6} {'eps':>5}  {'fooled':13} {'AUROC':13} {'adaptive AUROC':15} adaptive success")
    for beta in args.betas:
        name = "plain" if beta == float("inf") else f"SN, beta {beta:g}"
        results: dict[tuple[str, float], list[Result]] = {}
        for seed in args.seeds:
            split = load_data(args.set, args.data, train_size=args.train_size, seed=seed)
            model = trained(split.train, beta, seed, args.epochs)
            unit = float(split.train.x.flatten(1).norm(dim=1).mean())
            x, y = split.test.x[: args.test_size], split.test.y[: args.test_size]
            for attack, perturb in ATTACKS.items():
                for eps in EPS:
                    attacked = perturb(model, x, y, eps * unit)
                    result = judged(model, attacked, x, y, unit, eps * unit)
                    results.setdefault((attack, eps), []).append(result)
                    rows.append((name, attack, eps, seed, *result))
        for (attack, eps), runs in results.items():
            columns = [spread(list(values)) for values in zip(*runs)]
            widths = (13, 13, 15, 0)
            print(f"{name:12} {attack:6} {eps:5.2f}  " + " ".join(c.ljust(w) for c, w in zip(columns, widths)))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
