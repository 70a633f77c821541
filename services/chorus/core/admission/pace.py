"""How long requests wait and take, by what those of late did: what waits are told and deadlines judged by."""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.1
# Fewer say too little to refuse anybody by.
_ENOUGH = 5


@dataclass(slots=True)
class Pace:
    """Fading means of requests that ended well: seconds each, and tokens generated for each."""

    typical_s: float = 0.0
    typical_tokens: float = 0.0
    count: int = 0

    @property
    def is_known(self) -> bool:
        """Whether enough have ended to go by."""
        return self.count >= _ENOUGH

    def note(self, seconds: float, tokens: int) -> None:
        """A request ended well after so long, with so many tokens."""
        self.count += 1
        weight = max(_SMOOTHING, 1.0 / self.count)  # the plain mean at first
        self.typical_s += weight * (seconds - self.typical_s)
        self.typical_tokens += weight * (tokens - self.typical_tokens)

    def expected_s(self, most_tokens: int) -> float:
        """How long one takes that generates `most_tokens` at most (0: no bound is known)."""
        if not 0 < most_tokens < self.typical_tokens:
            return self.typical_s
        return self.typical_s * most_tokens / self.typical_tokens


# As in the first version of TCP's timer: some 95% of them are not that slow.
_DEVIATIONS = 2.0
# Beyond it, a class would be refused for what a few of its requests met.
_MOST_OVERRUN = 3.0


@dataclass(slots=True)
class Overrun:
    """How much longer than expected the requests of a class take that are slow among them.

    Mean and mean deviation of the ratio, as TCP keeps them of its round trips (V. Jacobson, 1988). A class that is put
    back for a more urgent one, as batch work is, takes longer than others of its lane.
    """

    mean: float = 1.0
    deviation: float = 0.0

    @property
    def factor(self) -> float:
        """Seconds expected, times this, are enough for most; at least 1."""
        return min(max(self.mean + _DEVIATIONS * self.deviation, 1.0), _MOST_OVERRUN)

    def note(self, expected_s: float, took_s: float) -> None:
        """A request ended well that had been expected to take so long."""
        if expected_s > 0.0:
            ratio = min(took_s / expected_s, _MOST_OVERRUN)
            self.deviation += _SMOOTHING * (abs(ratio - self.mean) - self.deviation)
            self.mean += _SMOOTHING * (ratio - self.mean)

    def doubted(self) -> None:
        """A request was refused for it: were it wrong, nothing would ever be measured that says so."""
        self.deviation *= 1.0 - _SMOOTHING / 4
        self.mean += _SMOOTHING / 4 * (1.0 - self.mean)


@dataclass(slots=True)
class Flow:
    """How often one of a class has its turn while others of it wait. Times are seconds on a clock."""

    interval_s: float = 0.0
    count: int = 0
    _last: float | None = None

    def queued(self, now: float) -> None:
        """Somebody waits, and nobody did before."""
        self._last = now

    def went(self, now: float, *, last: bool) -> None:
        """One had its turn; `last`: nobody waits any more. Who did not have to wait tells nothing."""
        if self._last is None:
            return
        self.count += 1
        weight = max(_SMOOTHING, 1.0 / self.count)
        self.interval_s += weight * (now - self._last - self.interval_s)
        self._last = None if last else now

    def wait_s(self, before: int, now: float) -> float:
        """How long somebody waits who comes after so many.

        Where nobody has had a turn for longer than usual, or ever, it goes on like that.
        """
        if not before or self._last is None:
            return 0.0
        usual_s = (before + 1) * self.interval_s if self.count >= _ENOUGH else 0.0
        return max(usual_s, now - self._last)
