"""Telling apart what native libraries write to standard error, without losing any of it.

gRPC's core logs to file descriptor 2 and nowhere else. To get at its lines, descriptor 2 becomes a pipe, and a small
process of its own reads that (`stderr_divider`): wanted lines are handed back to this process, all others go to the
real standard error. It is a process and not a thread because the last words of a process that dies in native code (an
assertion of llama.cpp, a fatal line of gRPC) are the ones that matter, and would die in the pipe with it. Python's own
`sys.stderr` keeps writing to the real one directly.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from chorus.telemetry import stderr_divider


class NativeStderr:
    """Descriptor 2 while it is divided. `close()` joins it again."""

    def __init__(self, real: int, lines: int, child: subprocess.Popen[bytes], python_stderr: TextIO | None) -> None:
        self._real = real
        self._lines = lines
        self._child = child
        self._python_stderr = python_stderr
        self._thread: threading.Thread | None = None
        self._closed = False

    def read_lines(self, handle: Callable[[str], None]) -> None:
        """Calls `handle` for every wanted line, those written before included, in a daemon thread, until closed.

        `handle` must not raise.
        """
        self._thread = threading.Thread(target=self._read, args=(handle,), name="native-stderr", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Gives descriptor 2 its file back, after waiting a moment for what was written. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        os.dup2(self._real, 2)
        if self._python_stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            sys.stderr = self._python_stderr
        # The child ends at the end of the pipe; a process that we started may still hold that open, so nobody waits
        # for long.
        if self._thread is not None:
            self._thread.join(timeout_s)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout_s)
        self._child.returncode = self._child.returncode or 0  # or its end would be warned of

    def _read(self, handle: Callable[[str], None]) -> None:
        with os.fdopen(self._lines, "rb") as lines:
            for line in lines:
                handle(line.decode("utf-8", "replace").rstrip("\n"))


def divide_stderr(start: str, continuation: str) -> NativeStderr | None:
    """Starts to divide descriptor 2; returns None where that can't be done (Windows; no standard error).

    A line is wanted that the regular expression `start` matches at its start, or `continuation` in full right after a
    wanted one; both are about bytes, as latin-1.
    """
    if os.name != "posix" or not sys.executable:
        return None
    try:
        real = os.dup(2)
    except OSError:
        return None
    sys.stderr.flush()
    pipe_out, pipe_in = os.pipe()
    lines_out, lines_in = os.pipe()
    descriptors = (pipe_out, lines_in, real)
    try:
        # A session of its own: a signal for our group is not for it, which ends when we have.
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-IS", stderr_divider.__file__, *map(str, descriptors), start, continuation],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
    except OSError:
        for descriptor in (*descriptors, pipe_in, lines_out):
            os.close(descriptor)
        return None
    os.close(pipe_out)
    os.close(lines_in)
    os.dup2(pipe_in, 2)
    os.close(pipe_in)
    replaced: TextIO | None = None
    if _writes_to(sys.stderr, 2):
        replaced = sys.stderr
        sys.stderr = os.fdopen(real, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    return NativeStderr(real, lines_out, child, replaced)


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, io.UnsupportedOperation):
        return False  # a test's, or a notebook's
