"""Ways to choose a runner, each as one coordinator has it: Chorus' own beside what others do."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from random import Random
from typing import Protocol

from chorus.core.errors import ChorusError
from chorus.core.fleet.directory import Directory, DirectoryChange
from chorus.core.placement import InFlight, Needs, Roster, Situation, place
from chorus.core.resilience.breakers import Breakers, Outcome, Trial
from chorus.core.resilience.failures import Failures
from chorus.sim.machines import ARTIFACT, MODEL


@dataclass(frozen=True, slots=True)
class Asking:
    """A request for an answer of up to so many tokens, of none of `tried`, at that moment."""

    tokens: int
    tried: AbstractSet[str]
    now: float


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt's end. `trial` is what the policy returned when it began; `failed`: it ended with an error."""

    runner_id: str
    trial: Trial | None
    failed: bool


class Policy(Protocol):
    """What a coordinator knows and how it chooses. `now` is simulated seconds."""

    def named(self, coordinator: str) -> None:
        """Before anything: what machines call this coordinator in their reports."""
        ...

    def changed(self, directory: Directory, change: DirectoryChange, now: float) -> None:
        """Another directory: it is what `choose` goes by from now on."""
        ...

    def choose(self, asking: Asking) -> str | None:
        """Whom to ask; None where there is nobody."""
        ...

    def began(self, runner_id: str, now: float) -> Trial | None:
        """The request was sent there; what is returned is told again when it ends."""
        ...

    def ended(self, attempt: Ended, now: float) -> None:
        """It has ended there."""
        ...


class _Counting:
    """What the others know: the names, what each reported, and their own requests under way there."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._names: list[str] = []
        self._busy: dict[str, int] = {}
        self._in_flight = InFlight()

    def named(self, coordinator: str) -> None:
        self._in_flight = InFlight(coordinator)

    def changed(self, directory: Directory, change: DirectoryChange, now: float) -> None:
        for record in change.removed:
            self._busy.pop(record.runner.runner_id, None)
            self._in_flight.left(record.runner.runner_id)
        for entry in change.upserts:
            (load,) = entry.record.load.models
            self._busy[entry.record.runner.runner_id] = load.slots_used + load.queued
            self._in_flight.reported(entry.record.runner.runner_id, now, entry.record.load.by_coordinator)
        if len(self._names) != len(directory.entries) or change.removed:
            self._names = sorted(directory.entries)

    def began(self, runner_id: str, now: float) -> Trial | None:
        self._in_flight.began(runner_id, now)
        return None

    def ended(self, attempt: Ended, now: float) -> None:
        self._in_flight.ended(attempt.runner_id, now)  # a failure is an end as any other

    def load(self, runner_id: str) -> int:
        """Requests at a runner, as far as it is known here."""
        return self._busy.get(runner_id, 0) + self._in_flight.unreported.get(runner_id, 0)

    def _untried(self, tried: AbstractSet[str]) -> str | None:
        names = [name for name in self._names if name not in tried]
        return self._rng.choice(names) if names else None


class RoundRobin(_Counting):
    """One after the other, from a start by chance."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._next = rng.randrange(1 << 20)

    def choose(self, asking: Asking) -> str | None:
        for _ in range(len(self._names)):
            self._next = (self._next + 1) % len(self._names)
            if self._names[self._next] not in asking.tried:
                return self._names[self._next]
        return None


class LeastLoaded(_Counting):
    """Whoever has fewest requests; by chance among equals, of whom the first few looked at are enough."""

    def choose(self, asking: Asking) -> str | None:
        names = self._names
        if not names:
            return None
        start = self._rng.randrange(len(names))
        best, least = None, 1 << 30
        for offset in range(len(names)):
            name = names[(start + offset) % len(names)]
            if name not in asking.tried and (load := self.load(name)) < least:
                best, least = name, load
                if load <= 0:
                    break
        return best


class TwoChoices(_Counting):
    """Two by chance, and of these the one with fewer requests (Mitzenmacher, 2001)."""

    def choose(self, asking: Asking) -> str | None:
        if len(self._names) < 2:
            return self._untried(asking.tried)
        one, other = self._rng.sample(self._names, 2)
        if one in asking.tried or other in asking.tried:
            return self._untried(asking.tried)
        return min(one, other, key=self.load)


class Chorus:
    """What a coordinator of Chorus does: the same calls of the same core as `coordinator/placing.py`."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._directory = Directory()
        self._roster, self._in_flight = Roster(), InFlight()
        self._failures, self._breakers = Failures(), Breakers()

    def named(self, coordinator: str) -> None:
        self._in_flight = InFlight(coordinator)

    def changed(self, directory: Directory, change: DirectoryChange, now: float) -> None:
        self._directory = directory
        for record in change.removed:
            name = record.runner.runner_id
            self._in_flight.left(name)
            self._failures.forget(name)
            self._breakers.forget(name)
        for entry in change.upserts:
            runner = entry.record.runner
            self._breakers.incarnated(runner.runner_id, runner.incarnation)
            self._in_flight.reported(runner.runner_id, now, entry.record.load.by_coordinator)

    def choose(self, asking: Asking) -> str | None:
        needs = Needs(model=MODEL, answer_tokens=asking.tokens)
        situation = Situation(
            in_flight=self._in_flight.unreported,
            company=self._in_flight.company,
            tried=asking.tried,
            barred=self._breakers.barred(asking.now),
            penalties=self._failures.penalties(asking.now),
        )
        pool = self._roster.pool(needs, self._directory)
        try:
            return place(needs, self._directory, rng=self._rng, situation=situation, pool=pool).runner_id
        except ChorusError:
            return None

    def began(self, runner_id: str, now: float) -> Trial | None:
        self._in_flight.began(runner_id, now)
        return self._breakers.began(runner_id, ARTIFACT, 1, now)

    def ended(self, attempt: Ended, now: float) -> None:
        self._in_flight.ended(attempt.runner_id, now)
        assert attempt.trial is not None
        self._breakers.ended(attempt.trial, Outcome.BAD if attempt.failed else Outcome.GOOD, now)
        if attempt.failed:
            self._failures.failed(attempt.runner_id, 1, now)
        else:
            self._failures.succeeded(attempt.runner_id, 1, now)
