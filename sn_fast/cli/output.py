"""What goes to stdout and stderr, whatever their encoding and whoever reads them."""

from __future__ import annotations

import codecs
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from ..errors import UserError

CLOSED_PIPE = 141  # 128 + SIGPIPE, as of a program that the signal ends

_ERRORS = "sn_fast.plain"
_PLAIN = {
    "ℓ": "l",
    "ε": "eps",
    "β": "beta",
    "γ": "gamma",
    "σ": "sigma",
    "∞": "inf",
    "×": "x",
    "·": "*",
    "±": "+-",
    "²": "^2",
    "≤": "<=",
    "≥": ">=",
    "–": "-",
    "—": "-",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "ß": "ss",
    "æ": "ae",
    "ø": "o",
    "ł": "l",
}


def prepare() -> None:
    """Give characters that a stream's encoding lacks an ASCII alternative, so that no text fails after the work."""
    codecs.register_error(_ERRORS, _alternative)
    for stream, defaults in ((sys.stdout, ("strict", "surrogateescape")), (sys.stderr, ("backslashreplace",))):
        if getattr(stream, "errors", None) in defaults and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def write(text: str) -> None:
    """Print ``text`` to stdout.

    Raises:
        BrokenPipeError: nobody reads it any more.
        UserError: it cannot be written.
    """
    try:
        print(_plain(text, getattr(sys.stdout, "encoding", None) or "utf-8"), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to standard output: {error.strerror}") from None


def write_error(line: str) -> None:
    """Print one line to stderr, if it is still open."""
    try:
        print(" ".join(line.splitlines()), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def close(code: int, *, process_ends: bool) -> int:
    """Flush stdout; returns the exit code. Of a process that ends, what is printed later does not get to stdout."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = CLOSED_PIPE
        _discard(sys.stdout)
    except OSError:
        _discard(sys.stdout)
    if process_ends:
        with suppress(OSError):
            os.dup2(2, 1)
    return code


@contextmanager
def others_on_stderr() -> Iterator[None]:
    """What code that is not ours prints to stdout, by whatever way, goes to stderr."""
    _flush(sys.stdout, sys.__stdout__)
    try:
        stdout = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        stdout = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush(sys.__stdout__, sys.stderr)
        if stdout is not None:
            os.dup2(stdout, 1)
            os.close(stdout)


def _flush(*streams: Any) -> None:
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _discard(stream: Any) -> None:
    """What is still in the buffer cannot be written: let it go nowhere, or Python would try again at its end."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _alternative(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of a codec: one character at a time."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not text: as it was
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _ascii(character), error.start + 1


def _ascii(character: str) -> str:
    folded = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _PLAIN.get(character) or folded or "?"


def _plain(text: str, encoding: str) -> str:
    """``text`` with alternatives for what the encoding lacks; columns stay where they are if there is room."""
    try:
        text.encode(encoding, "surrogateescape")
    except UnicodeError:
        return "\n".join(_plain_line(line, encoding) for line in text.split("\n"))
    return text


def _plain_line(line: str, encoding: str) -> str:
    parts, excess = [], 0
    for part in re.findall(r" {2,}|[^ ]+| ", line):
        if part.isspace():
            kept = max(1, len(part) - excess) if len(part) > 1 else 1
            excess -= len(part) - kept
            parts.append(part[:kept])
        else:
            plain = "".join(c if _has(encoding, c) else _ascii(c) for c in part)
            excess += len(plain) - len(part)
            parts.append(plain)
    return "".join(parts)


def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding, "surrogateescape")
    except UnicodeError:
        return False
    return True
