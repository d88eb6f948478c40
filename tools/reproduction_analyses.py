"""Make the data and figures of docs/reproduction_analyses.md anew, from the runs that the page's commands compute.

python tools/reproduction_analyses.py STORE [STORE ...] --mnist DIR --cifar10 DIR

A store is a folder of runs with their networks (``OUT/runs`` of ``sn-fast reproduce --out OUT``); of a run in several
stores the first is taken. Robustness curves and the detector have commands of their own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sn_fast.experiments.analysis import (  # noqa: E402
    Analysis,
    Capacities,
    capacities,
    margin_distributions,
    random_label_fitting,
    robustness_curves,
    sample_size_sweep,
    write_analysis,
)
from sn_fast.experiments.data import Samples, Split, load_data  # noqa: E402
from sn_fast.experiments.figures import beta_label  # noqa: E402
from sn_fast.experiments.reproduction import Outcome, Store  # noqa: E402
from sn_fast.experiments.training import TrainedNetwork, trained_networks  # noqa: E402

OUT = ROOT / "docs" / "results" / "reproduction_analyses"
IMAGES = 2000  # for margins and gradient norms
ALL_OF_MNIST = 55_000


class Runs:
    """All finished runs of some stores, their networks and data."""

    def __init__(self, stores: Sequence[Path], data: dict[str, str]) -> None:
        self.data = data
        self.folders: dict[str, Path] = {}
        self.outcomes: list[Outcome] = []
        for store in map(Store, stores):
            for outcome in store.everything():
                if outcome.status == "finished" and outcome.config.key() not in self.folders:
                    self.folders[outcome.config.key()] = store.folder(outcome.config)
                    self.outcomes.append(outcome)
        self.outcomes.sort(key=lambda run: (run.config.scheme, run.config.arch, -run.config.beta, run.config.seed))
        self._splits: dict[str, Split] = {}

    def chosen(self, where: Callable[[Outcome], bool]) -> list[Outcome]:
        """In the exact arithmetic: the published one changes what is learned, not what a network can learn."""
        return [run for run in self.outcomes if not run.config.reference and where(run)]

    def network(self, run: Outcome) -> TrainedNetwork:
        (network,) = trained_networks(self.folders[run.config.key()]).values()
        return network

    def split(self, run: Outcome) -> Split:
        """The data of a run."""
        options = run.config.data_options() | {"root": self.data[run.config.data]}
        if not (run.config.random_labels or run.config.train_size):
            options["seed"] = 0  # all images: the seed decides nothing
        key = repr((run.config.data, options))
        if key not in self._splits:
            self._splits[key] = load_data(run.config.data, **options)
        return self._splits[key]

    def samples(self, run: Outcome) -> Samples:
        """The first training images, with the labels trained on."""
        return first(self.split(run).train)

    def capacities(self, members: list[Outcome]) -> Capacities:
        """Each network on the images and labels that it was trained on."""
        found = [capacities([(run, self.network(run))], self.samples(run)) for run in members]
        return Capacities(tuple(network for part in found for network in part.networks))


def first(samples: Samples) -> Samples:
    return Samples(samples.x[:IMAGES], samples.y[:IMAGES])


def robustness(runs: Runs, members: list[Outcome]) -> Analysis:
    """Of each seed a panel, under PGM in l2 and l_inf."""
    networks: dict[str, dict[str, nn.Module]] = {}
    for run in members:
        of_seed = networks.setdefault(f"{run.config.scheme.upper()}, seed {run.config.seed}", {})
        of_seed[beta_label(run.config.beta)] = runs.network(run).model
    split = runs.split(members[0])
    config = members[0].config.with_strength(split.mean_norm)
    linf = replace(config, norm="inf", eps=None).with_strength(split.mean_norm)
    attacks = {"PGM": config.adversary("pgm"), "PGM, ℓ∞": linf.adversary("pgm")}
    return robustness_curves(networks, first(split.test), attacks, factors=(0, 1, 2))


def analyses(runs: Runs) -> dict[str, Analysis]:
    """All of the page, by the names of their files."""
    cifar = runs.chosen(lambda run: run.config.data == "cifar10")
    few = [run for run in cifar if run.config.train_size == 2000]
    relu = runs.chosen(lambda run: (run.config.data, run.config.arch) == ("mnist", "mlp1_relu_sn"))
    found: dict[str, Analysis] = {"random-labels": random_label_fitting(_both_labels(cifar))}
    for scheme in ("erm", "fgm", "pgm"):
        members = [run for run in relu if run.config.scheme == scheme]
        if len({run.config.train_size for run in members}) > 1:
            found[f"sizes-{scheme}"] = sample_size_sweep(members, full_size=ALL_OF_MNIST)
    every = runs.chosen(lambda run: run.config.data == "mnist" and run.config.train_size is None)
    found["capacities-mnist"] = runs.capacities(every)
    fgm = [run for run in relu if run.config.scheme == "fgm"]
    reached = [run for run in fgm if run.config.beta in (1.0, math.inf)]  # larger caps change nothing on few images
    for size in (500, 2000):
        found[f"capacities-mnist-{size}"] = runs.capacities([run for run in reached if run.config.train_size == size])
    members = [run for run in reached if run.config.train_size == 2000]
    found["robustness-mnist-2000"] = robustness(runs, members)
    found["capacities-cifar10"] = runs.capacities(few)
    erm = [run for run in few if run.config.scheme == "erm"]
    panels = {
        beta_label(beta): {
            "random labels" if run.config.random_labels else "true labels": (
                runs.network(run).model,
                runs.samples(run),
            )
            for run in erm
            if run.config.beta == beta
        }
        for beta in sorted({run.config.beta for run in erm}, reverse=True)
    }
    found["margins-cifar10"] = margin_distributions(panels)
    return found


def _both_labels(runs: list[Outcome]) -> list[Outcome]:
    """Runs of whose kind there are some with random labels and some with true ones."""
    kinds: dict[str, set[bool]] = {}

    def kind(run: Outcome) -> str:
        return replace(run.config, random_labels=0.0, beta=1.0, seed=0).key()

    for run in runs:
        kinds.setdefault(kind(run), set()).add(run.config.random_labels > 0)
    return [run for run in runs if len(kinds[kind(run)]) == 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="folders of runs")
    parser.add_argument("--mnist", required=True, metavar="DIR", help="folder of MNIST's official files")
    parser.add_argument("--cifar10", required=True, metavar="DIR", help="folder of CIFAR-10's python batches")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder (default: that of the page)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(args.stores, {"mnist": args.mnist, "cifar10": args.cifar10})
    for name, analysis in analyses(runs).items():
        for path in write_analysis(analysis, args.out / "figures", name):
            if path.suffix == ".svg":
                path.unlink()
        if isinstance(analysis, Capacities):
            for scheme in dict.fromkeys(network.scheme for network in analysis.networks):
                tau = analysis.rank_correlation(scheme)
                print(f"{name} {scheme}: tau {math.nan if tau is None else tau:+.2f}")
        print(name, flush=True)


if __name__ == "__main__":
    main()
