"""Cores that nobody wants right now: what a computation too short to share them fairly may use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from chorus.engine.llama.settings import usable_threads

LOAD = Path("/proc/loadavg")
_LOOKS = 4
_BETWEEN_LOOKS_S = 5e-5  # whoever handed over the request has got off its core by then


class FreeCores:
    """Counts free cores by how many threads of the whole machine are running or ready to run.

    Linux tells that in /proc/loadavg, which takes some 10 us to read. Where nobody tells, no core counts as free. Where
    this process may use some cores alone, all that runs is held to run on these.
    """

    def __init__(
        self, path: Path = LOAD, *, cores: int | None = None, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._cores = cores if cores is not None else usable_threads()
        self._pause = pause
        try:
            self._file: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def count(self, wanted: int) -> int:
        """How many of `wanted` threads, the caller's own among them, would each have a core to itself; at least 1.

        Looks again, some 0.3 ms in all, before it says less than `wanted`.
        """
        free = 1
        for look in range(_LOOKS if wanted > 1 else 0):
            if look:
                self._pause(_BETWEEN_LOOKS_S)
            running = self._running()
            if running is None:
                return 1
            free = self._cores - (running - 1)
            if free >= wanted:
                return wanted
        return max(1, free)

    def _running(self) -> int | None:
        """Threads that run or are ready to, the caller's among them."""
        if self._file is None:
            return None
        try:
            return max(1, int(os.pread(self._file, 128, 0).split()[3].split(b"/")[0]))
        except (OSError, IndexError, ValueError):
            return None
