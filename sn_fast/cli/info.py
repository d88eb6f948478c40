"""``sn-fast info``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..info import info
from .output import write

_EXAMPLE = """\
example:
  sn-fast info --json
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions and backend",
        description="Print versions, the backend in use, and the GPU if there is one.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    facts = info()
    write(json.dumps(facts) if options.json else "\n".join(f"{name:10s} {fact}" for name, fact in facts.items()))
