"""The command line ``sn-fast``: one module per command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import _interrupts
from ..errors import OptionError, UserError, shortened
from . import info, norms, output, train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse ignores a closed pipe here, and Python reports it at its end.
        if file is None or file is sys.stdout:
            output.write(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sn-fast``; returns the exit code.

    0; 2 after bad input (one line on stderr); 130 after Ctrl-C and 143 after SIGTERM (one line); 141 if the reader of
    its output has gone.
    """
    output.prepare()
    try:
        code, line = _outcome(argv)
    except KeyboardInterrupt:  # while an error was being handled
        code, line = _interrupts.exit_code(), _interrupts.line()
    except SystemExit as leaving:  # of --help
        _finish(int(leaving.code or 0), "")
        raise
    return _finish(code, line)


def _outcome(argv: Sequence[str] | None) -> tuple[int, str]:
    """Exit code, and the line for stderr."""
    try:
        _interrupts.working()
        options = _parser().parse_args(argv)
        options.run(options)
        if not _interrupts.received():
            return 0, ""
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or _interrupts.received():  # it can come out as any other exception
            return _interrupts.exit_code(), _interrupts.line(error)
        if isinstance(error, OptionError):
            option = f"--{error.name.replace('_', '-')}"
            error = UserError(f"argument {option}: invalid value {error.value}: {error.remedy}")
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sn-fast", description="True spectral norms of neural-network layers, and adversarial training with them."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, norms, info):
        command.add_command(commands)
    return parser
