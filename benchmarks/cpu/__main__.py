"""Measure, and renew what the documents show of it.

    python -m benchmarks.cpu                       # all tables, about ten minutes on an idle machine
    python -m benchmarks.cpu refresh steps         # some of them
    python -m benchmarks.cpu --resume              # what an interrupted run of this commit has not measured yet
    python -m benchmarks.cpu --report              # the tables of the documents, from the results; measures nothing

Peers: pip install -e '.[peers]' torchattacks foolbox; without one its rows say so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sn_fast.inspection.timing import like_a_long_process

from . import data, report, tables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(tables.TABLES)} (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that this commit has measured here")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name matches (re.search)")
    parser.add_argument("--quick", action="store_true", help="few turns and short curves: does it run?")
    parser.add_argument("--report", action="store_true", help="only renew the tables of the documents")
    parser.add_argument("--out", type=Path, default=data.FOLDER, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.tables) - set(tables.TABLES))
    if unknown:
        parser.error(f"unknown table {unknown[0]!r}; choose from {', '.join(tables.TABLES)}")
    if not options.report:
        torch.set_num_threads(1)
        like_a_long_process()
        start = time.perf_counter()
        for name in options.tables or tables.TABLES:
            table = tables.TABLES[name]
            rows = table.rows(options.quick)
            data.measure(name, rows, options.out, resume=options.resume, facts=table.facts(), only=options.rows)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if options.out == data.FOLDER:
        report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
