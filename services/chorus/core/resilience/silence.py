"""Whether a process that lives has been silent for so long that it is stopped, or hangs, and has to be killed.

Somebody asks it again and again whether it serves. Any answer will do, since one that says "not yet" is alive. Who asks
can stand still himself, when a laptop sleeps or a debugger stops him: what he missed then says nothing of the other,
and the count begins anew.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from chorus.core.errors import ConfigError

SILENT_S = 10.0
"""How long a process may be silent unless somebody says otherwise."""


@dataclass(frozen=True, slots=True)
class ProbePolicy:
    """How often a process is asked, how long it has for an answer, and when it has been silent for too long.

    `silent_s` 0 leaves silent processes alone.
    """

    silent_s: float = SILENT_S
    interval_s: float = 1.0
    timeout_s: float = 2.0
    misses_at_least: int = 3

    def __post_init__(self) -> None:
        if self.silent_s < 0 or self.interval_s <= 0 or self.timeout_s <= 0 or self.misses_at_least < 1:
            raise ConfigError(f"no process can be watched like this: {self}")

    @property
    def late_s(self) -> float:
        """More than this between two outcomes, and it was the one who asks that stood still."""
        return 2.0 * (self.interval_s + self.timeout_s)


class Silence:
    """The decision for one life of one process, which has just answered for the first time."""

    def __init__(self, policy: ProbePolicy, now: float) -> None:
        self._policy = policy
        self._heard = now
        self._last = now
        self._misses = 0

    def answered(self, now: float) -> None:
        """It said something."""
        self._heard = self._last = now
        self._misses = 0

    def missed(self, now: float) -> float | None:
        """It did not answer in time. Returns for how many seconds it has been silent if that is too long."""
        policy = self._policy
        if now - self._last > policy.late_s:
            self.answered(now)
            return None
        self._last = now
        self._misses += 1
        silent_s = now - self._heard
        too_long = policy.silent_s > 0 and silent_s >= policy.silent_s and self._misses >= policy.misses_at_least
        return silent_s if too_long else None
