"""Telling apart what native libraries write to standard error, without losing any of it.

gRPC's core logs to file descriptor 2 and nowhere else. To get at its lines, descriptor 2 becomes a pipe, and a small
child process reads it: lines that `is_wanted` are handed back to this process, all others go to the real standard
error. It is a process and not a thread because the last words of a process that dies in native code (an assertion of
llama.cpp, a fatal line of gRPC) are the ones that matter, and would die in the pipe with it. Python's own `sys.stderr`
keeps writing to the real one directly.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TextIO

_CHUNK = 64 * 1024
# A record longer than this is no log line; it is passed on in pieces rather than kept.
_LINE_MAX = 256 * 1024
# What a pipe takes whole or not at all (PIPE_BUF is 4096 on Linux), so that no line is torn.
_GIVEN_MAX = 4000

Wanted = Callable[[bytes, bool], bool]
"""Whether a line (without its end) is wanted; the flag tells whether the line before it was."""


class NativeStderr:
    """Descriptor 2 while it is divided. `close()` joins it again."""

    def __init__(self, real: int, lines: int, child: int, python_stderr: TextIO | None) -> None:
        self._real = real
        self._lines = lines
        self._child = child
        self._python_stderr = python_stderr
        self._thread: threading.Thread | None = None
        self._closed = False

    def read_lines(self, handle: Callable[[str], None]) -> None:
        """Calls `handle` for every wanted line, in a daemon thread, until closed. It must not raise."""
        self._thread = threading.Thread(target=self._read, args=(handle,), name="native-stderr", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Gives descriptor 2 its file back, after waiting a moment for what was written. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        os.dup2(self._real, 2)
        if self._python_stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            sys.stderr = self._python_stderr
        # The child ends at the end of the pipe; a process that we started may still hold it open, so nobody waits long.
        if self._thread is not None:
            self._thread.join(timeout_s)
        ended = self._thread is not None and not self._thread.is_alive()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0 if ended else os.WNOHANG)

    def _read(self, handle: Callable[[str], None]) -> None:
        with os.fdopen(self._lines, "rb", buffering=_CHUNK) as lines:
            for line in lines:
                handle(line.decode("utf-8", "replace").rstrip("\n"))


def divide_stderr(is_wanted: Wanted) -> NativeStderr | None:
    """Starts to divide descriptor 2; returns None where that can't be done (no fork, no standard error).

    Call it once, before there are other threads.
    """
    if not hasattr(os, "fork"):
        return None
    try:
        real = os.dup(2)
    except OSError:
        return None
    sys.stderr.flush()
    pipe_out, pipe_in = os.pipe()
    lines_out, lines_in = os.pipe()
    child = os.fork()
    if child == 0:
        _run_child(pipe_out, lines_in, real, {pipe_in, lines_out}, is_wanted)
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


def _run_child(source: int, wanted: int, rest: int, unused: set[int], is_wanted: Wanted) -> None:
    """The child's whole life; never returns. Nothing of the parent's is cleaned up here: that is the parent's to do."""
    try:
        # Keys of the keyboard and of supervisors reach the whole group; this process ends when its parent has.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        for descriptor in unused:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            os.close(0)
        # Not blocking: a parent that is slow at logging loses lines of gRPC's rather than stopping everybody's.
        os.set_blocking(wanted, False)
        _divide(source, wanted, rest, is_wanted)
    finally:
        os._exit(0)


def _divide(source: int, wanted: int, rest: int, is_wanted: Wanted) -> None:
    pending, was_wanted = b"", False
    while chunk := os.read(source, _CHUNK):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            was_wanted = is_wanted(line, was_wanted)
            if not (was_wanted and _give(wanted, line)):
                _write_all(rest, line + b"\n")
        # Half a line that is nobody's log is a progress bar or a question, which must not wait for its end. A full read
        # may have been cut anywhere, so that one waits for the next.
        if len(pending) > _LINE_MAX or (len(chunk) < _CHUNK and pending and not is_wanted(pending, was_wanted)):
            _write_all(rest, pending)
            pending, was_wanted = b"", False
    _write_all(rest, pending)


def _give(descriptor: int, line: bytes) -> bool:
    try:
        os.write(descriptor, line[:_GIVEN_MAX] + b"\n")
        return True
    except BlockingIOError:
        return True
    except OSError:
        return False  # the parent is gone: whatever was not read is for the real standard error


def _write_all(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]
