"""Steps that a person can follow: one line each, what a long one is doing now, and why a failed one failed.

On a terminal the line of the running step is rewritten in place; elsewhere (CI, a pipe) a long step says every
`QUIET_S` seconds how far it is, so that silence means a hang.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

QUIET_S = 15.0
TAIL_LINES = 30
# ninja numbers what it builds; pip indents the lines of a build that it shows.
_NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
_PIP = re.compile(r"^(?:Collecting ([^\s;]+)|(Installing) collected packages)")


class SetupError(Exception):
    """A step that cannot go on. The message says what happened; `advice` says what to do about it."""

    def __init__(self, message: str, *, advice: str = "", tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.advice = advice
        self.tail = tuple(tail)


def progress(line: str) -> str | None:
    """What a line of output says of how far the work is: ninja's `[57/140] c++ ...`, pip's `Collecting ...`."""
    if match := _NINJA.match(line):
        return f"{match[1]} of {match[2]} files built"
    if match := _PIP.match(line):
        return match[1] or "installing"
    return None


def elapsed(seconds: float) -> str:
    """Seconds as people say them: `4.2 s`, `3 min 07 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


class Step:
    """One step under way; `say` tells what it is doing."""

    def __init__(self, title: str, log: IO[str], *, quiet: bool = False) -> None:
        self._title = title
        self._log = log
        self._quiet = quiet
        self._began = time.monotonic()
        self._said = self._began
        self._tty = sys.stdout.isatty()
        self._result = ""
        self._doing = ""

    def say(self, what: str, *, now: bool = False) -> None:
        """What the step is doing from here on: shown at once on a terminal (or if `now`), every `QUIET_S` elsewhere."""
        self._doing = what
        self._show(now=now)

    def _show(self, *, now: bool = False) -> None:
        if self._quiet:
            return
        doing = f": {self._doing}" if self._doing else ""
        text = f"  ..    {self._title}{doing} ({elapsed(time.monotonic() - self._began)})"
        if self._tty:
            width = None if now else shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="\n" if now else "", flush=True)
        elif now or time.monotonic() - self._said >= QUIET_S:
            self._said = time.monotonic()
            print(text, flush=True)

    def result(self, text: str) -> None:
        """What the step's closing line says after its title."""
        self._result = text

    def close(self, mark: str) -> None:
        start = "\r\x1b[2K" if self._tty else ""
        detail = f": {self._result}" if self._result else ""
        print(f"{start}  {mark:<5} {self._title}{detail} ({elapsed(time.monotonic() - self._began)})", flush=True)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        limit_s: float,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        advice: str = "",
    ) -> str:
        """Runs a command to its end, its output into the log, and shows how far it is. Returns what it printed.

        Raises SetupError with the last lines if the command fails, takes over `limit_s` seconds or isn't there.
        The command gets a process group of its own, which goes with this process when that is interrupted.
        """
        words = [str(word) for word in argv]
        name = " ".join(words[words.index("-m") + 1 :][:2]) if "-m" in words else Path(words[0]).name
        self._log.write(f"\n$ {' '.join(words)}\n")
        self._log.flush()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise SetupError(f"{name} did not start: {error.strerror}", advice=advice) from error
        printed: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                self._log.write(line)
                if now := progress(line):
                    self._doing = now

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        deadline = time.monotonic() + limit_s
        try:
            self._show()
            while reader.is_alive() and time.monotonic() < deadline:
                reader.join(timeout=0.5 if self._tty else 1.0)
                self._show()
            process.wait(timeout=max(0.0, deadline - time.monotonic()) + 1.0)
        except subprocess.TimeoutExpired:
            raise SetupError(
                f"{name} was still running after {elapsed(limit_s)}; stopped it",
                advice=advice,
                tail=_tail(printed),
            ) from None
        finally:
            _end_group(process)
            reader.join(timeout=5.0)
            self._log.flush()
        if process.returncode != 0:
            raise SetupError(f"{name} ended with exit status {process.returncode}", advice=advice, tail=_tail(printed))
        return "".join(printed)


def _tail(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in deque((line for line in lines if line.strip()), maxlen=TAIL_LINES)]


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends a command and everything that it started; a compiler left behind would go on for minutes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            process.poll()  # collects the leader, so that an empty group is seen as such
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
                return
            time.sleep(0.05)


@contextmanager
def step(title: str, log: IO[str]) -> Iterator[Step]:
    """Prints `title`'s line: running, then ok with the time it took, or FAILED when the body raises."""
    current = Step(title, log)
    try:
        yield current
    except BaseException as error:
        current.close("stop" if isinstance(error, KeyboardInterrupt) else "FAIL")
        raise
    current.close("ok")
