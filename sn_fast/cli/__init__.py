"""The command line ``sn-fast``: one module per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UserError
from . import info, norms, train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sn-fast``; returns the exit code: 0, 2 after bad input (one line on stderr), 130 after Ctrl-C."""
    try:
        options = _parser().parse_args(argv)
        options.run(options)
    except UserError as error:
        print(f"sn-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"sn-fast: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sn-fast", description="True spectral norms of neural-network layers, and adversarial training with them."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, norms, info):
        command.add_command(commands)
    return parser
