"""What every command shares: where text goes, how errors look, which exit codes there are.

Answers and tables go to standard output, everything else to standard error, so that a pipe gets what it asked for.
rich is imported only when something is printed with it: `chorus --help` and a pipe do not wait for it.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import typer

from chorus.core.errors import (
    CertificateError,
    ChorusError,
    ConfigError,
    InvalidRequestError,
    RunnersUnavailableError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)

if TYPE_CHECKING:
    from rich.console import Console

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DEGRADED = 3
EXIT_INTERRUPTED = 130
DEBUG_ENV = "CHORUS_DEBUG"

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

_HINTS: tuple[tuple[type[ChorusError], str], ...] = (
    (UnknownModelError, "`chorus models list` shows the models there are, `chorus models pull NAME` fetches one"),
    (RunnersUnavailableError, "`chorus status` shows who lives; `chorus up` starts a mesh on this machine"),
    (UnavailableError, "`chorus status` shows what is up, `chorus doctor` looks for what is wrong"),
    (UnauthenticatedError, "`chorus certs verify` checks the certificates of this machine"),
    (CertificateError, "`chorus certs verify` checks the certificates; `chorus up` makes those of a local mesh"),
    (ConfigError, "`chorus config docs` describes every key"),
)
# What no program can do anything about.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
# A coordinator that tells of a broken runner is there itself.
_ASK_AGAIN = "the answer is not whole; ask again, and another runner may give it. `chorus status` shows who lives"


@functools.cache
def console() -> Console:
    """Where answers and tables go."""
    from rich.console import Console

    # Tables keep their columns when they go to a file or a pipe, whose readers do not wrap lines.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, soft_wrap=True, width=240)


@functools.cache
def err() -> Console:
    """Where progress, notes and errors go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: Any, *, lines: bool = False) -> None:
    """Prints one JSON document, laid out for people where a person looks on; on a line of its own if `lines`."""
    indent = 2 if sys.stdout.isatty() and not lines else None
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def note(message: str) -> None:
    """Prints a line to standard error; rich's markup in it is obeyed."""
    # In a log or a pipe a note stays one line.
    err().print(message, soft_wrap=not err().is_terminal)


def fail(message: str, *, hint: str = "", code: int = EXIT_FAILED) -> NoReturn:
    """Says what went wrong and, where it is known, what to do; then ends the command with `code`."""
    show_error(message, hint)
    raise typer.Exit(code)


def show_error(message: str, hint: str = "") -> None:
    """Prints an error as every command does: `error: ...`, and a hint on a line of its own."""
    from rich.text import Text

    # In a log or a pipe a message stays one line.
    err().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=not err().is_terminal)
    if hint:
        err().print(Text.assemble(("hint: ", "bold cyan"), hint), soft_wrap=not err().is_terminal)


def hint_for(error: ChorusError) -> str:
    """What to try next after `error`; empty where its own message says so already."""
    if "`chorus " in error.message:
        return ""
    if isinstance(error, UnavailableError) and " the runner " in error.message:
        return _ASK_AGAIN
    return next((hint for kind, hint in _HINTS if isinstance(error, kind)), "")


def exit_code_for(error: ChorusError) -> int:
    """2 where the command or its configuration is wrong, 1 for everything else."""
    return EXIT_USAGE if isinstance(error, ConfigError | InvalidRequestError) else EXIT_FAILED


def guarded(call: Callable[[], _Result]) -> _Result:
    """Calls `call`; what it raises becomes a message and an exit code, never a traceback (unless CHORUS_DEBUG asks)."""
    debugging = bool(os.environ.get(DEBUG_ENV))
    try:
        return call()
    except ChorusError as error:
        if debugging:
            raise
        fail(error.message, hint=hint_for(error), code=exit_code_for(error))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_OK) from None
    except Exception as error:
        if debugging or _is_of_command_line(error):
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            fail(f"{error.filename or 'what was to be written'}: {error.strerror}")
        fail(
            f"this is a defect of Chorus: {type(error).__name__}: {error}",
            hint=f"{DEBUG_ENV}=1 shows where it happened; please report it",
        )


def handles_errors(command: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    """Makes `command` end with a message and an exit code instead of a traceback."""

    @functools.wraps(command)
    def wrapper(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        return guarded(functools.partial(command, *args, **kwargs))

    return wrapper


def _is_of_command_line(error: Exception) -> bool:
    """Whether it is typer's own way of ending a command (usage errors, Exit, Abort), which it shows itself."""
    return type(error).__module__.partition(".")[0] in ("typer", "click")
