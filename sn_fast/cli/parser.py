"""The argument parser of every command: its errors are one line, and name options as they are typed."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import OptionError, UserError
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
def options_for(parser: argparse.ArgumentParser, **others: str) -> Iterator[None]:
    """Within this context, or the decorated command, errors name options where library functions name arguments.

    An argument in backticks becomes the option of the same name; ``others``: arguments that have other names here.
    """
    options = {action.dest: [action.metavar, *action.option_strings][-1] for action in parser._actions}
    try:
        yield
    except UserError as error:
        text = str(error)
        if isinstance(error, OptionError):
            text = f"argument `{error.name}`: invalid value {error.value}: {error.remedy}"
        raise UserError(renamed(text, {**options, **others})) from error


def renamed(message: str, names: Mapping[str, Any]) -> str:
    """The message with the arguments that it names in backticks by other names; unknown ones stay."""
    return re.sub(r"`(\w+)`", lambda found: str(names.get(found[1], found[0])), message)


def names_in(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers_in(name: str, text: str, kind: type[float] | type[int]) -> tuple[Any, ...]:
    """The numbers of a list with commas, which is the argument ``name``.

    Raises:
        OptionError: something in it is no number.
    """
    try:
        return tuple(kind(part) for part in names_in(text))
    except ValueError:
        raise OptionError(name, text, "give numbers, as in 1,2,4") from None
