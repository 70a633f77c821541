"""Whether a step of an engine takes so long that it will never end.

A step's time grows with its tokens, but never faster than they do, and a bigger step is never quicker than a smaller
one. So what was measured of one size bounds the others from above: `StepTimes` keeps a smoothed time for each power of
two and answers with the smallest bound. `StuckWatch` is asked every second or so by somebody who can be late
himself: after the machine slept, or the process was stopped and went on, its clock starts again.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a step may take: `factor` times what is expected, at least `floor_s`.

    As long as nothing was measured, `factor` times the floor: the first step reads weights from a slow disk.
    """

    floor_s: float = 30.0
    factor: float = 20.0

    def allowed_s(self, expected_s: float | None) -> float:
        """Seconds that a step may take of which so much is expected; None where nothing is known of it."""
        return self.factor * self.floor_s if expected_s is None else max(self.floor_s, self.factor * expected_s)


class StepTimes:
    """How long steps took lately, by their size. One instance for one kind of work.

    `took` may be called in one thread while `expected_s` is in another.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by the bit length of the number of tokens

    def took(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens, at least 1, has taken so long."""
        size = tokens.bit_length()
        before = self._seconds.get(size)
        self._seconds[size] = seconds if before is None else before + (seconds - before) * _SMOOTHING

    def expected_s(self, tokens: int) -> float | None:
        """What a step of so many tokens takes at most, going by those that were measured; None without any."""
        size = tokens.bit_length()
        bounds = [
            seconds if measured >= size else seconds * 2.0 ** (size - measured)
            for measured, seconds in list(self._seconds.items())
        ]
        return min(bounds, default=None)


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way: how many tokens are in it, when it began, and what it is expected to take at most."""

    tokens: int
    began: float
    expected_s: float | None


@dataclass(frozen=True, slots=True)
class Stuck:
    """A step that is given up: how long it has been watched, and how long it was allowed."""

    tokens: int
    seconds: float
    allowed_s: float


class StuckWatch:
    """Looks at one engine thread again and again; each look must come within `late_s` of the last to count."""

    def __init__(self, patience: Patience, *, late_s: float = 5.0) -> None:
        self._patience = patience
        self._late_s = late_s
        self._looked: float | None = None
        self._on_time_since = 0.0

    def look(self, step: Step | None, now: float) -> Stuck | None:
        """What to make of the step that is under way at `now`, None between two steps."""
        if self._looked is None or now - self._looked > self._late_s:
            self._on_time_since = now
        self._looked = now
        if step is None:
            return None
        seconds = now - max(step.began, self._on_time_since)
        allowed_s = self._patience.allowed_s(step.expected_s)
        return Stuck(step.tokens, seconds, allowed_s) if seconds > allowed_s else None
