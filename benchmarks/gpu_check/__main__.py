"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import report, runner
from .plan import STAGES, chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; exit code 0: all was run and nothing failed, 1: something failed, 2: bad input or no GPU."""
    listed = "\n".join(f"  {s.number} {s.name:<10} {s.title}" for s in STAGES)
    parser = argparse.ArgumentParser(
        "gpu_check", description=f"{__doc__}\n\nstages:\n{listed}", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stages", default="all", help="such as 1,4-6 or build,power (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for everything (default: 540)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, one network")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes; the times mean nothing")
    parser.add_argument("--report", action="store_true", help="renew the tables in docs/benchmarks.md")
    parser.add_argument("--commit", default="", help="recorded where the folder is no git checkout")
    options = parser.parse_args(arguments)
    if options.report:
        report.write()
        return 0
    try:
        stages = chosen(options.stages)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    return runner.run(
        stages,
        out=options.out,
        budget=options.budget,
        quick=options.quick,
        rehearse=options.rehearse,
        commit=options.commit,
    )


if __name__ == "__main__":
    sys.exit(main())
