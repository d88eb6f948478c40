"""The job of ``sn-fast train`` for several seeds: mean and spread with and without the cap, and of their difference.

    python examples/five_seeds.py                                          # the default, seeds 0 to 4
    python examples/five_seeds.py --scheme fgm --output fgm_five_seeds.json

Writes everything measured as JSON and prints a Markdown table. A seed takes as long as ``sn-fast train``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import sn_fast
from sn_fast.experiments.training import TrainConfig, train

COLUMNS = ("clean", "fgm", "pgm", "wrm")
PARTS = ("train", "test", "gap")
Spread = dict[str, float]


def measure(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The final figures of both networks, without what is only of interest for a single run."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(TrainConfig.create(**options, seed=seed), folder, progress=True)
    networks = result.metrics["networks"]
    return {
        "seed": seed,
        "networks": {
            name: {key: value for key, value in network["final"].items() if key != "margins"}
            for name, network in networks.items()
        },
    }


def spread(values: list[float]) -> Spread:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds; differences are taken seed by seed, capped minus plain."""
    plain, capped = runs[0]["networks"]

    def values(network: str, part: str, column: str) -> list[float]:
        return [run["networks"][network]["accuracy"][part][column] for run in runs]

    def differences(part: str, column: str) -> list[float]:
        return [b - a for a, b in zip(values(plain, part, column), values(capped, part, column))]

    def over_all(entry: Any) -> dict[str, dict[str, Spread]]:
        return {part: {column: entry(part, column) for column in COLUMNS} for part in PARTS}

    def test_curve(network: str) -> list[Spread]:
        return [spread(list(at)) for at in zip(*(run["networks"][network]["curve"]["test"] for run in runs))]

    return {
        **{
            name: over_all(lambda part, column, name=name: spread(values(name, part, column)))
            for name in (plain, capped)
        },
        "difference": over_all(lambda part, column: spread(differences(part, column))),
        "seeds_higher": over_all(lambda part, column: sum(d > 0 for d in differences(part, column))),
        "curve": {
            "eps": runs[0]["networks"][plain]["curve"]["eps"],
            plain: test_curve(plain),
            capped: test_curve(capped),
        },
        "seconds_per_epoch": {
            name: spread([run["networks"][name]["seconds_per_epoch"] for run in runs]) for name in (plain, capped)
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The summary as a table; accuracies in %, mean and standard deviation."""

    def cell(entry: Spread) -> str:
        return f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"

    seeds = len(result["runs"])
    plain, capped = result["runs"][0]["networks"]
    lines = [f"| accuracy (%) | {plain} | {capped} | difference | seeds higher |", "|---|---|---|---|---|"]
    numbers = result["summary"]
    for column in COLUMNS:
        for part in PARTS:
            cells = [cell(numbers[key][part][column]) for key in (plain, capped, "difference")]
            higher = f"{numbers['seeds_higher'][part][column]} of {seeds}"
            lines.append(f"| {column}, {part} | {' | '.join(cells)} | {higher} |")
    lines += ["", f"| ε, test under attack | {plain} | {capped} |", "|---|---|---|"]
    curve = numbers["curve"]
    lines += [
        f"| {eps:g} | {cell(one)} | {cell(other)} |"
        for eps, one, other in zip(curve["eps"], curve[plain], curve[capped])
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--scheme", default="pgm")
    parser.add_argument("--norm", default="2")
    parser.add_argument("--output", type=Path, default=Path("docs/results/digits_five_seeds.json"))
    arguments = parser.parse_args()

    options = {"data": arguments.data, "scheme": arguments.scheme, "norm": arguments.norm, "device": "cpu"}
    runs = [measure(options, seed) for seed in arguments.seeds]
    config = TrainConfig.create(**options).to_json()
    del config["seed"]
    result = {"config": config, "versions": sn_fast.info(), "summary": summary(runs), "runs": runs}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
