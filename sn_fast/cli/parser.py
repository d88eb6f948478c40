"""The argument parser of every command: its errors are one line, and name options as they are typed."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import UserError
from . import output


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Each command refuses its own: argparse would leave that to the parser above, which does not know its options.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._similar(unknown)}")
        return namespace, unknown

    def _similar(self, unknown: Sequence[str]) -> str:
        name = next((text.partition("=")[0] for text in unknown if text.startswith("-")), "")
        options = {option.lstrip("-"): option for option in self._option_string_actions}
        close = difflib.get_close_matches(name.lstrip("-"), options, n=1)
        return f" (similar: {options[close[0]]})" if close else ""

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse ignores a closed pipe here, and Python reports it at its end.
        if file is None or file is sys.stdout:
            output.write(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


@contextmanager
def options_for(names: Mapping[str, str]) -> Iterator[None]:
    """Within this context errors of library functions, which put their arguments in backticks, name options instead."""
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(error)),)
        raise
