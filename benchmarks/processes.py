"""Processes that a benchmark starts: their logs, what they use, and their certain end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

_LOG_LINES = 25
_STOP_LIMIT_S = 15.0
_PR_SET_PDEATHSIG = 1
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """A benchmark that can't go on; the message is for whoever started it."""


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Started:
    """One process, its output in a file."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], environ: Mapping[str, str], log: Path, *, watches_parent: bool
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(word) for word in argv],
                env=dict(environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends this one itself
                # Python forks where it has something to run in the child, which gRPC's threads do not survive.
                preexec_fn=None if watches_parent else _die_with_parent,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises `BenchmarkError` with its last words if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise BenchmarkError(
                f"{self.name} ended by itself (status {code}). The end of its log:\n{self.last_words()}"
            )

    def last_words(self) -> str:
        """The end of its log, for an error's text."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(
            ["The end of its log:", *(f"    {line}" for line in lines)] if lines else ["It logged nothing."]
        )

    def cpu_s(self) -> float:
        """Seconds of CPU that all its threads have used so far, to 10 ms."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def peak_bytes(self) -> int:
        """The most memory that was ever resident: its own and what it maps, a model's file included (VmHWM)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0

    def resident_bytes(self) -> int:
        """The memory that is resident now (VmRSS)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()

    def end(self) -> None:
        """Ends it, politely at first. May be called twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.stdin.close()
        self.stdout.close()


class Processes:
    """Starts processes, their logs in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Started] = []

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        environ: Mapping[str, str] = os.environ,
        *,
        watches_parent: bool = False,
    ) -> Started:
        """Starts one; from the main thread, with which it ends, unless it `watches_parent` itself."""
        started = Started(name, argv, environ, self.folder / f"{name}.log", watches_parent=watches_parent)
        self._started.append(started)
        return started

    def check(self) -> None:
        """Raises `BenchmarkError` if one of them has ended by itself."""
        for started in self._started:
            started.check()

    def end(self, started: Started) -> None:
        """Ends one before the others."""
        started.end()
        self._started.remove(started)


@contextlib.contextmanager
def processes_in(folder: Path) -> Iterator[Processes]:
    """Processes that end with this, whatever happens: an error, Ctrl-C, SIGTERM, or the death of this process."""
    processes = Processes(folder)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield processes
    finally:
        signal.signal(signal.SIGTERM, before)
        for started in reversed(processes._started):
            started.end()


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def say(text: str, *, end: str = "\n") -> None:
    """Progress, on standard error: results alone go to standard output."""
    print(text, end=end, file=sys.stderr, flush=True)


def machine() -> str:
    """The machine in a line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu}, Python {sys.version.split()[0]}, "
        f"load average at the start {load:.1f}, {time.strftime('%Y-%m-%d %H:%M')}"
    )
