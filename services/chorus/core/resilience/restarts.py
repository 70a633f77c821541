"""Whether and when a process that ended is started again.

One `Restarts` stands for one supervised process. It is told what happened (started, healthy, ended) and when, and says
what to do. Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from chorus.core.errors import InternalError


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patient a supervisor is. `supervised` False leaves down whatever ends."""

    supervised: bool = True
    first_backoff_s: float = 0.5
    backoff_factor: float = 2.0
    longest_backoff_s: float = 30.0
    # A process that was healthy for this long has proved itself: what ended it later is a new trouble.
    healthy_after_s: float = 10.0
    failures_allowed: int = 3

    def backoff_s(self, failures: int) -> float:
        """Seconds to wait after the `failures`th failure in a row, from 1."""
        # The exponent is bounded before the power is taken: a float overflows long before anybody loses patience.
        grown = self.first_backoff_s * self.backoff_factor ** min(failures - 1, 64)
        return min(grown, self.longest_backoff_s)


class ProcessPhase(StrEnum):
    """Where a supervised process stands."""

    STARTING = "starting"  # runs, and has not said yet that it serves
    HEALTHY = "healthy"  # serves
    WAITING = "waiting"  # ended; will be started again
    DOWN = "down"  # ended; is left so
    STOPPED = "stopped"  # was asked to end, or was never started


@dataclass(frozen=True, slots=True)
class StartAgain:
    """Start it again at this time."""

    at: float
    failures: int


@dataclass(frozen=True, slots=True)
class LeaveDown:
    """Leave it down, and say so."""

    failures: int


Decision: TypeAlias = StartAgain | LeaveDown


class Restarts:
    """The decision for one process. Not thread-safe; raises InternalError for an event that cannot happen now."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._phase = ProcessPhase.STOPPED
        self._failures = 0
        self._healthy_since: float | None = None

    @property
    def phase(self) -> ProcessPhase:
        """Where the process stands."""
        return self._phase

    @property
    def failures(self) -> int:
        """Failures in a row so far; a process that proves itself starts from none at its next end."""
        return self._failures

    @property
    def running(self) -> bool:
        """Whether there is a process now."""
        return self._phase in (ProcessPhase.STARTING, ProcessPhase.HEALTHY)

    def started(self) -> None:
        """The process runs. From DOWN or STOPPED this is somebody's wish, so the count of failures begins anew."""
        if self.running:
            raise InternalError(f"a process that is {self._phase} was started")
        if self._phase is not ProcessPhase.WAITING:
            self._failures = 0
        self._phase = ProcessPhase.STARTING
        self._healthy_since = None

    def healthy(self, now: float) -> None:
        """It serves; saying so again changes nothing."""
        if not self.running:
            raise InternalError(f"a process that is {self._phase} was found healthy")
        if self._phase is ProcessPhase.STARTING:
            self._phase = ProcessPhase.HEALTHY
            self._healthy_since = now

    def ended(self, now: float) -> Decision:
        """It ended, or could not be started, though nobody asked it to. An exit code of 0 is no excuse."""
        if self._phase is ProcessPhase.DOWN:
            raise InternalError("a process that is down ended once more")
        if self._healthy_since is not None and now - self._healthy_since >= self._policy.healthy_after_s:
            self._failures = 0
        self._failures += 1
        self._healthy_since = None
        if not self._policy.supervised or self._failures >= self._policy.failures_allowed:
            self._phase = ProcessPhase.DOWN
            return LeaveDown(self._failures)
        self._phase = ProcessPhase.WAITING
        return StartAgain(now + self._policy.backoff_s(self._failures), self._failures)

    def stopped(self) -> None:
        """It was asked to end, and has, or need not be started any more."""
        self._phase = ProcessPhase.STOPPED
        self._healthy_since = None
