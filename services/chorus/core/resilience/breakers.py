"""Circuit breakers: a runner that keeps failing with a model is left alone for a while, then tried with one request.

One breaker for each runner and model, after M. Nygard's pattern ("Release It!"). Closed, it counts failures; enough of
them within the window open it, and placement passes that runner by for that model; after a pause it is half open: one
request, the probe, may go there, and how it ends closes the breaker or opens it again.

It stands beside the fading cost of failures (`failures.py`), which makes a failing runner dear at once, but never so
dear that nobody would be sent there while all others are busy. An open breaker is no matter of price.

A breaker prevents, it never causes, a failure: where all who could serve a request are barred, placement goes on as if
none was, and what becomes of that attempt is as good as a probe. So an attempt's end is counted whatever the state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from chorus.core.errors import ChorusError, ModelFileError
from chorus.core.resilience.failures import blames_runner


class BreakerState(StrEnum):
    """Where a breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Outcome(StrEnum):
    """What an attempt tells of the runner that it was made on."""

    GOOD = "good"
    BAD = "bad"
    NEITHER = "neither"  # the caller went away, the request was wrong, the runner was full or leaving


def outcome_of(error: ChorusError) -> Outcome:
    """What an attempt's error tells of the runner and the model: nothing good, and often nothing at all."""
    return Outcome.BAD if blames_runner(error) or isinstance(error, ModelFileError) else Outcome.NEITHER


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """`failures` within `window_s` open a breaker; `open_s` later it is half open."""

    failures: int = 5
    window_s: float = 60.0
    open_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Trial:
    """An attempt under way. `number` rises with everything that happens, so that it tells before from after."""

    runner_id: str
    model: str
    incarnation: int
    number: int


@dataclass(slots=True)
class _Breaker:
    failed_at: deque[float] = field(default_factory=deque)
    opened_at: float | None = None
    changed: int = 0  # the number of the last opening or closing
    probe: int | None = None  # the number of the attempt that is the probe
    probe_at: float = 0.0


class Breakers:
    """The breakers of all runners. Models are artifact names; `now` is seconds on a clock that only goes forward."""

    def __init__(self, rules: BreakerRules | None = None) -> None:
        self._rules = rules if rules is not None else BreakerRules()
        self._lives: dict[str, int] = {}  # the incarnation of each runner that was heard of
        self._runners: dict[str, dict[str, _Breaker]] = {}
        self._open: dict[tuple[str, str], _Breaker] = {}  # those that aren't closed
        self._number = 0

    def state(self, runner_id: str, model: str, now: float) -> BreakerState:
        """Where a breaker stands."""
        breaker = self._open.get((runner_id, model))
        if breaker is None or breaker.opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now >= breaker.opened_at + self._rules.open_s else BreakerState.OPEN

    def barred(self, now: float) -> frozenset[tuple[str, str]]:
        """The runners and models that no request should go to: open, or half open with the probe under way.

        A probe that hangs must not bar its runner for ever: after another pause there may be a second one.
        """
        if not self._open:  # the usual case, on every request's path
            return frozenset()
        return frozenset(key for key, breaker in self._open.items() if self._bars(breaker, now))

    def began(self, runner_id: str, model: str, incarnation: int, now: float) -> Trial:
        """An attempt begins; it is the probe where the breaker is half open and there is none. `ended` must follow."""
        self.incarnated(runner_id, incarnation)
        self._number += 1
        trial = Trial(runner_id, model, incarnation, self._number)
        breaker = self._runners.get(runner_id, {}).get(model)
        if breaker is not None and breaker.opened_at is not None and not self._bars(breaker, now):
            breaker.probe, breaker.probe_at = trial.number, now
        return trial

    def is_probe(self, trial: Trial) -> bool:
        """Whether an attempt under way is the one by which a half-open breaker is tried."""
        breaker = self._open.get((trial.runner_id, trial.model))
        return breaker is not None and breaker.probe == trial.number

    def ended(self, trial: Trial, outcome: Outcome, now: float) -> BreakerState | None:
        """An attempt has ended. Returns the breaker's state where that opened or closed it, else None.

        What began before the breaker last opened or closed, or on another incarnation, tells nothing of how the runner
        fares now, and counts for nothing.
        """
        if self._lives.get(trial.runner_id) != trial.incarnation:
            return None
        breaker = self._runners.get(trial.runner_id, {}).get(trial.model)
        if breaker is None:
            if outcome is not Outcome.BAD:
                return None
            breaker = self._runners.setdefault(trial.runner_id, {})[trial.model] = _Breaker()
        if breaker.probe == trial.number:
            breaker.probe = None
        if outcome is Outcome.NEITHER or trial.number < breaker.changed:
            return None
        if outcome is Outcome.GOOD:
            return self._close(trial, breaker) if breaker.opened_at is not None else None
        if breaker.opened_at is None:
            breaker.failed_at.append(now)
            while breaker.failed_at[0] < now - self._rules.window_s:
                breaker.failed_at.popleft()
            if len(breaker.failed_at) < self._rules.failures:
                return None
        return self._trip(trial, breaker, now)

    def incarnated(self, runner_id: str, incarnation: int) -> None:
        """This incarnation of a runner lives: another process starts with closed breakers."""
        if self._lives.get(runner_id, incarnation) < incarnation:
            self.forget(runner_id)
        self._lives.setdefault(runner_id, incarnation)

    def forget(self, runner_id: str) -> None:
        """The runner left the directory; what its attempts under way will tell does not count."""
        self._lives.pop(runner_id, None)
        for model in self._runners.pop(runner_id, {}):
            self._open.pop((runner_id, model), None)

    def states(self, now: float) -> Mapping[tuple[str, str], BreakerState]:
        """Every breaker that is not closed, by runner and model."""
        return {key: self.state(*key, now) for key in self._open}

    def _trip(self, trial: Trial, breaker: _Breaker, now: float) -> BreakerState:
        breaker.opened_at = now
        breaker.probe = None
        breaker.failed_at.clear()
        self._open[trial.runner_id, trial.model] = breaker
        self._number += 1
        breaker.changed = self._number
        return BreakerState.OPEN

    def _close(self, trial: Trial, breaker: _Breaker) -> BreakerState:
        breaker.opened_at = breaker.probe = None
        del self._open[trial.runner_id, trial.model]
        self._number += 1
        breaker.changed = self._number
        return BreakerState.CLOSED

    def _bars(self, breaker: _Breaker, now: float) -> bool:
        if breaker.opened_at is None:
            return False
        if now < breaker.opened_at + self._rules.open_s:
            return True
        return breaker.probe is not None and now < breaker.probe_at + self._rules.open_s

    def validate_state(self) -> None:
        """Raises AssertionError where the breakers contradict themselves."""
        every = {(runner, model): found for runner, models in self._runners.items() for model, found in models.items()}
        opened = {key: breaker for key, breaker in every.items() if breaker.opened_at is not None}
        assert opened == self._open, "the index of open breakers is not what is open"
        for key, breaker in every.items():
            assert len(breaker.failed_at) < self._rules.failures, f"{key} has seen enough failures and is not open"
            assert breaker.opened_at is None or not breaker.failed_at, f"{key} counts while it is open"
            assert breaker.probe is None or breaker.opened_at is not None, f"{key} is closed and probed"
