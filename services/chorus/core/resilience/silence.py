"""Whether a process that lives has been silent for so long that it is stopped, or hangs, and has to be killed.

Somebody asks it again and again whether it serves. Any answer will do, since one that says "not yet" is alive. Who asks
can stand still himself, when a laptop sleeps or a debugger stops him: what he missed then says nothing of the other,
and the count begins anew. Where a whole machine is starved, both are late, he who asks less than who does the work: an
answer that he missed while he was late at his own timers is not counted, though not for ever.

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

    `silent_s` 0 leaves silent processes alone. A miss is excused where who asks was more than `late_s` late himself,
    until the process has been silent for `excused_for` times as long as it may be.
    """

    silent_s: float = SILENT_S
    interval_s: float = 1.0
    timeout_s: float = 2.0
    misses_at_least: int = 3
    late_s: float = 0.25
    excused_for: float = 6.0

    def __post_init__(self) -> None:
        times = (self.interval_s, self.timeout_s, self.late_s)
        if self.silent_s < 0 or min(times) <= 0 or self.misses_at_least < 1 or self.excused_for < 1:
            raise ConfigError(f"no process can be watched like this: {self}")

    @property
    def still_s(self) -> float:
        """More than this between two outcomes, and it was the one who asks that stood still."""
        return 2.0 * (self.interval_s + self.timeout_s)


class Silence:
    """The decision for one life of one process, which has just answered for the first time."""

    def __init__(self, policy: ProbePolicy, now: float) -> None:
        self._policy = policy
        self.answered(now)

    def answered(self, now: float) -> None:
        """It said something."""
        self._heard = self._last = now
        self._misses = 0
        self._excused_s = 0.0

    def missed(self, now: float, *, late_s: float = 0.0) -> float | None:
        """It did not answer in time. Returns for how many seconds it has been silent if that is too long.

        `late_s`: how late the one who asks was himself since the last outcome, at most.
        """
        policy, since_last_s = self._policy, now - self._last
        if since_last_s > policy.still_s:
            self.answered(now)
            return None
        self._last = now
        silent_s = now - self._heard
        if late_s > policy.late_s and silent_s < policy.excused_for * policy.silent_s:
            self._excused_s += since_last_s
            return None
        self._misses += 1
        if silent_s >= policy.excused_for * policy.silent_s:
            self._excused_s = 0.0
        counted_s = silent_s - self._excused_s
        too_long = policy.silent_s > 0 and counted_s >= policy.silent_s and self._misses >= policy.misses_at_least
        return silent_s if too_long else None
