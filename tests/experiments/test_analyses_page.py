"""The numbers of docs/reproduction_analyses.md are those of the data that are kept beside it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduction_analyses.md").read_text(encoding="utf-8")
DATA = ROOT / "docs" / "results" / "reproduction_analyses" / "figures"


def rows_of(name: str) -> list[dict[str, str]]:
    with (DATA / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def percent(share: str, digits: int = 1) -> str:
    return f"{100 * float(share):.{digits}f}"


def markdown(head: str, rows: list[list[Any]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def random_labels() -> str:
    rows = [
        [
            row["panel"],
            *row["labels and cap"].split(", "),
            row["epochs"],
            percent(row["train accuracy"]),
            percent(row["test accuracy"]),
        ]
        for row in rows_of("random-labels-summary")
    ]
    assert {row["state"] for row in rows_of("random-labels-summary")} == {"finished"}
    return markdown("images, most epochs | labels | cap | epochs | training accuracy | test accuracy", rows)


def robustness() -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for name, attacks in (("robustness-mlp1_relu", ("FGM", "PGM", "WRM")), ("robustness-mlp1_relu-linf", ("PGM",))):
        points: dict[tuple[str, str, str], dict[float, str]] = {}
        for row in rows_of(name):
            key = row["defence"], row["network"], row["attack"]
            points.setdefault(key, {})[float(row["eps"])] = row["accuracy"]
        for defence, network in dict.fromkeys(key[:2] for key in points):
            cells = found.setdefault((defence, network), [])
            for attack in attacks:
                curve = points[defence, network, attack]
                top = max(curve)  # twice the nominal strength
                wanted = ([] if cells else [0.0]) + ([top / 2, top] if attack == "PGM" else [top / 2])
                cells += [percent(curve[min(curve, key=lambda eps: abs(eps - want))]) for want in wanted]
    head = "trained with | cap | clean | FGM | PGM | PGM, 2 ε | WRM | PGM ℓ∞ | PGM ℓ∞, 2 ε"
    return markdown(head, [[*key, *cells] for key, cells in found.items()])


def sizes() -> str:
    rows = []
    for scheme in ("erm", "fgm"):
        for row in rows_of(f"sizes-{scheme}"):
            spread = f" ± {percent(row['test spread'])}" if row["test spread"] else ""
            train, test = percent(row["train accuracy"]), percent(row["test accuracy"])
            size = f"{int(row['training images']):,}"
            rows.append([scheme.upper(), row["network"], size, row["runs"], train, test + spread, percent(row["gap"])])
            assert not row["notes"]
    return markdown("scheme | cap | images | seeds | training | test | gap", rows)


def robustness_of_seeds() -> str:
    cells: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows_of("robustness-mnist-2000"):
        cells.setdefault((row["attack"], float(row["eps"])), {}).setdefault(row["network"], []).append(
            100 * float(row["accuracy"])
        )
    strengths = [(attack, eps) for attack, eps in sorted(cells) if attack == "PGM" or eps > 0]
    caps = list(cells["PGM", 0.0])
    rows = [[cap, *(f"{mean(cells[of][cap]):.1f} ± {stdev(cells[of][cap]):.1f}" for of in strengths)] for cap in caps]
    assert {len(values) for by_cap in cells.values() for values in by_cap.values()} == {3}
    return markdown("cap | clean | PGM | PGM, 2 ε | PGM ℓ∞ | PGM ℓ∞, 2 ε", rows)


def groups() -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """The networks of each group of the table of capacities, by scheme."""
    for name in sorted(path.stem for path in DATA.glob("capacities-*.csv")):
        rows = rows_of(name)
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            yield name.removeprefix("capacities-"), scheme, [row for row in rows if row["scheme"] == scheme]


def kendall(pairs: list[tuple[float, float]]) -> tuple[int, int, float]:
    """Pairs in the theory's order, pairs in the other, and tau-b, counted one by one."""
    signs = [((a[0] > b[0]) - (a[0] < b[0]), (a[1] > b[1]) - (a[1] < b[1])) for a, b in combinations(pairs, 2)]
    same, other = (sum(x * y == sign for x, y in signs) for sign in (1, -1))
    untied = [sum(pair[i] != 0 for pair in signs) for i in (0, 1)]
    return same, other, (same - other) / (untied[0] * untied[1]) ** 0.5


def capacities() -> str:
    rows: list[list[Any]] = []
    for group, scheme, networks in groups():
        if len(networks) < 3:
            continue
        gaps = [float(row["gap"]) for row in networks]
        values = [float(row["log10 Phi/margin^2"]) for row in networks]
        same, other, tau = kendall(list(zip(values, gaps)))
        ranges = (f"{100 * min(gaps):.1f} to {100 * max(gaps):.1f}", f"{min(values):.1f} to {max(values):.1f}")
        rows.append([group, scheme.upper(), len(networks), *ranges, same, other, f"{tau:+.2f}"])
    head = "networks | scheme | number | gap (points) | log10 Φ/γ² | pairs in order | in reverse | τ"
    return markdown(head, rows)


@pytest.mark.parametrize("table", [random_labels, robustness, robustness_of_seeds, sizes, capacities])
def test_a_table_is_that_of_the_data(table) -> None:
    assert table() in PAGE


if __name__ == "__main__":
    print(*(table() for table in (random_labels, robustness, sizes, capacities)), sep="\n\n")
