"""A coordinator's own requests under way, and how many of them a runner's last load report can't know of.

Load reports are a heartbeat old. A coordinator that went by them alone would send everything of half a second to the
runner that was idle then. Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

# How old what a report tells is when it arrives: it was counted before it went through a registry.
REPORT_LAG_S = 0.2
# Steps remembered for one runner without a report; beyond it the oldest are counted together.
MAX_STEPS = 256


class InFlight:
    """Counts for every runner. `unreported`, which changes in place, is what placement takes as `in_flight`."""

    def __init__(self) -> None:
        self._steps: dict[str, deque[tuple[float, int]]] = {}
        self._unreported: dict[str, int] = {}
        self._running: dict[str, int] = {}

    @property
    def unreported(self) -> Mapping[str, int]:
        """By runner id: requests begun less requests ended since its last report. Negative where more ended."""
        return self._unreported

    def running(self, runner_id: str) -> int:
        """Requests of ours that are under way at a runner."""
        return self._running.get(runner_id, 0)

    def began(self, runner_id: str, now: float) -> None:
        """A request was sent to a runner."""
        self._running[runner_id] = self._running.get(runner_id, 0) + 1
        self._step(runner_id, now, 1)

    def ended(self, runner_id: str, now: float) -> None:
        """It has ended, however it did."""
        left = self._running.get(runner_id, 0) - 1
        if left > 0:
            self._running[runner_id] = left
        else:
            self._running.pop(runner_id, None)
        self._step(runner_id, now, -1)

    def reported(self, runner_id: str, now: float) -> None:
        """A load report of a runner has come; what was long before it is in it."""
        steps = self._steps.get(runner_id)
        if steps is None:
            return
        while steps and steps[0][0] <= now - REPORT_LAG_S:
            self._unreported[runner_id] -= steps.popleft()[1]
        if not steps:
            del self._steps[runner_id], self._unreported[runner_id]

    def left(self, runner_id: str) -> None:
        """A runner has left the directory; another of its name starts from nothing."""
        self._steps.pop(runner_id, None)
        self._unreported.pop(runner_id, None)

    def _step(self, runner_id: str, now: float, change: int) -> None:
        steps = self._steps.setdefault(runner_id, deque())
        steps.append((now, change))
        self._unreported[runner_id] = self._unreported.get(runner_id, 0) + change
        if len(steps) > MAX_STEPS:
            (_, first), (at, second) = steps.popleft(), steps.popleft()
            steps.appendleft((at, first + second))
