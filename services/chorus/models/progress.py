"""How a pull tells what it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

_INTERVAL_S = 0.1


class PullPhase(StrEnum):
    """What goes on."""

    RESOLVING = "resolving"
    WAITING = "waiting"  # for another process that pulls the same
    DOWNLOADING = "downloading"
    COPYING = "copying"
    VERIFYING = "verifying"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class PullProgress:
    """One report. `total_bytes` is 0 where it isn't known; `message` is for people and may be empty."""

    phase: PullPhase
    done_bytes: int = 0
    total_bytes: int = 0
    message: str = ""


ProgressCallback = Callable[[PullProgress], None]


class Reporter:
    """Passes reports on: every change of phase or message at once, growing byte counts ten times a second.

    `stop` is set from another thread where the work must end; those who work look at it between pieces.
    """

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self._last: PullProgress | None = None
        self._last_at = 0.0
        self.stop = threading.Event()

    def report(self, phase: PullPhase, done_bytes: int = 0, total_bytes: int = 0, message: str = "") -> None:
        """Tells the callback, unless it heard the like a moment ago."""
        if self._callback is None:
            return
        last, now = self._last, time.monotonic()
        is_news = last is None or (last.phase, last.message) != (phase, message) or done_bytes == total_bytes
        if is_news or now - self._last_at >= _INTERVAL_S:
            self._last, self._last_at = PullProgress(phase, done_bytes, total_bytes, message), now
            self._callback(self._last)
