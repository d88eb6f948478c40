"""Ctrl-C and SIGTERM while this process is the command sn-fast: one line on stderr, exit code 128 + the signal.

The package imports this module first, so that it counts from there on, also while torch is being imported; it imports
nothing heavy itself. In every other program that imports sn_fast it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all the rest
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds that the work has to end by itself
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class _State:
    """Of this process; ``command`` is False in programs that only import sn_fast."""

    command = False
    working = False  # there is something to tidy up, so a signal raises KeyboardInterrupt
    number = 0  # of the first signal
    note = ""  # how to continue, where the exception that would say it is lost
    outcome: tuple[int, str] | None = None  # exit code and line that are still to be given


def is_command() -> bool:
    return _State.command


def received() -> int:
    """Number of the signal that has arrived; 0 without one."""
    return _State.number


def line(error: BaseException | None = None) -> str:
    """What the command says when it ends early; a job's KeyboardInterrupt may know how to continue."""
    text = (str(error) if isinstance(error, KeyboardInterrupt) else "") or _State.note or _WORDS[signal.SIGINT]
    if _State.number == signal.SIGTERM:
        text = text.replace(_WORDS[signal.SIGINT], _WORDS[signal.SIGTERM], 1)
    return f"sn-fast: {text}"


def how_to_continue(run: object) -> str:
    """What the command says of a run, in this folder, that it leaves unfinished."""
    import shlex

    return f"{_WORDS[signal.SIGINT]}; continue with: sn-fast train --resume {shlex.quote(str(run))}"


def note(text: str) -> None:
    """What the command says when it ends from here on and no exception says more; empty: nothing in particular."""
    _State.note = text


def exit_code() -> int:
    return 128 + (_State.number or signal.SIGINT)


def working() -> None:
    """From now on the first signal raises KeyboardInterrupt; before, it ends the process at once."""
    if not _State.command or _State.working:
        return
    if os.name == "posix":  # sees the signal also while the main thread is in a long call
        import threading

        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_restore)
        threading.Thread(target=_watch, args=(read,), daemon=True).start()
    _State.working = True


def finished(code: int, text: str = "") -> None:
    """The work is over, and ``text`` is to be printed: a signal no longer changes the outcome."""
    _State.outcome = code, text


def printed() -> None:
    """The line of the outcome is printed."""
    if _State.outcome is not None:
        finished(_State.outcome[0])


def begin() -> None:
    """Take over the signals that have their default action; one that the parent process ignores stays ignored."""
    _State.command = True
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _handle)
    hook, unraisable = sys.excepthook, sys.unraisablehook

    def uncaught(*error: Any) -> None:
        if _State.number:
            _leave()
        hook(*error)

    def ignored(error: Any) -> None:
        # In a destructor or a callback of C code Python drops the exception after printing it.
        if _State.number:
            _leave()
        unraisable(error)

    sys.excepthook, sys.unraisablehook = uncaught, ignored


def _handle(number: int, _: FrameType | None) -> None:
    first = not _State.number
    _State.number = _State.number or number
    if first and _State.working and _State.outcome is None:
        raise KeyboardInterrupt
    _leave()


def _leave() -> None:
    """End the process from wherever it is: an exception could be lost in code that is not ours."""
    code, text = _State.outcome or (exit_code(), line())
    if text:
        try:  # noqa: SIM105 - contextlib may not be imported yet
            os.write(2, f"{text}\n".encode("ascii", "replace"))
        except OSError:
            pass
    os._exit(code)


def _watch(pipe: int) -> None:
    """End the process after the grace period if the main thread has not, e.g. since it swallowed the exception."""
    import time

    number = 0
    while number not in SIGNALS:
        number = os.read(pipe, 1)[0]
    time.sleep(GRACE)
    _State.number = _State.number or number
    _leave()


def _restore() -> None:
    """In a forked child: the signals have their default action, and are none of the parent's."""
    _State.command = _State.working = False
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _is_command() -> bool:
    """Whether this process is ``sn-fast`` or ``python -m sn_fast``, and not a child of multiprocessing."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # while python -m imports the package; what follows the module's name is the user's
        module = sys.orig_argv[-len(arguments)]
        return module == "sn_fast" or (module.startswith("-") and module.endswith("msn_fast"))
    name = os.path.basename(arguments[0]).removesuffix(".exe").removesuffix("-script.py")
    return name == "sn-fast" and arguments[0] in sys.orig_argv


if _is_command():
    begin()
