"""The command line ``sn-fast``: one module per command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import __version__, _interrupts
from ..errors import UserError, shortened
from . import attack, bench, info, norms, output, reproduce, train
from .parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sn-fast``; returns the exit code.

    0; 2 after bad input (one line on stderr), or without a command (the help on stderr); 130 after Ctrl-C and 143 after
    SIGTERM (one line); 141 if the reader of its output has gone.
    """
    output.prepare()
    try:
        code, line = _outcome(argv)
    except KeyboardInterrupt:  # while an error was being handled
        code, line = _interrupts.exit_code(), _interrupts.line()
    except SystemExit as leaving:  # of --help and --version
        _finish(int(leaving.code or 0), "")
        raise
    return _finish(code, line)


def _outcome(argv: Sequence[str] | None) -> tuple[int, str]:
    """Exit code, and the line for stderr."""
    try:
        _interrupts.working()
        parser = _parser()
        options = parser.parse_args(argv)
        if not hasattr(options, "run"):  # no command
            parser.print_help(sys.stderr)
            return 2, ""
        options.run(options)
        if not _interrupts.received():
            return 0, ""
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or _interrupts.received():  # it can come out as any other exception
            return _interrupts.exit_code(), _interrupts.line(error)
        if isinstance(error, UserError):
            return 2, f"sn-fast: error: {shortened(error)}"
        if isinstance(error, BrokenPipeError):
            return output.CLOSED_PIPE, ""
        raise
    return _interrupts.exit_code(), _interrupts.line()  # something on the way has swallowed the exception


def _finish(code: int, line: str) -> int:
    _interrupts.finished(code, line)
    if line:
        output.write_error(line)
        _interrupts.printed()
    code = output.close(code, process_ends=_interrupts.is_command())
    _interrupts.finished(code)
    if _interrupts.is_command() and _interrupts.received():
        os._exit(code)  # at once: Python's own end takes seconds with torch
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="sn-fast",
        description="True spectral norms of neural-network layers, and adversarial training with them.",
        epilog="sn-fast COMMAND --help describes the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"sn-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (train, attack, reproduce, norms, bench, info):
        command.add_command(commands)
    return parser
