"""How often something happened lately, as one number that fades."""

from __future__ import annotations

import math


class Rate:
    """Events a second, each weighing less the longer ago it was: `window_s` seconds ago, about a third.

    Times are seconds on any clock that only goes forward.
    """

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._weight = 0.0
        self._at: float | None = None

    def note(self, now: float) -> None:
        """It happened."""
        self._fade(now)
        self._weight += 1.0

    def per_s(self, now: float) -> float:
        """Events a second as of `now`; 0 where there never was one."""
        self._fade(now)
        return self._weight / self._window_s

    def _fade(self, now: float) -> None:
        if self._at is not None:
            self._weight *= math.exp(-max(0.0, now - self._at) / self._window_s)
        self._at = now
