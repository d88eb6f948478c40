"""The table of docs/digits.md, from what ``five_seeds.py`` measured.

python examples/digits_table.py docs/results/digits_five_seeds.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"clean": "clean", "fgm": "FGM", "pgm": "PGM", "wrm": "WRM"}
PARTS = ("train", "test", "gap")


def table(result: dict[str, Any]) -> str:
    """Mean ± standard deviation over the seeds, in %, and how many seeds gain on the test set."""
    summary, seeds = result["summary"], len(result["runs"])
    plain, capped = result["runs"][0]["networks"]

    def cell(network: str, part: str, column: str) -> str:
        value = summary[network][part][column]
        return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"

    heads = [f"{name} {part}" for name in ("no SN,", f"β = {result['config']['beta']:g},") for part in PARTS]
    lines = [f"| accuracy (%) | {' | '.join(heads)} | seeds with a higher test |", "|---|" + "---|" * 7]
    for column, name in NAMES.items():
        cells = [cell(network, part, column) for network in (plain, capped) for part in PARTS]
        trained = " (trained with)" if column == result["config"]["scheme"] else ""
        higher = f"{summary['seeds_higher']['test'][column]} of {seeds}"
        lines.append(f"| {name}{trained} | {' | '.join(cells)} | {higher} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
