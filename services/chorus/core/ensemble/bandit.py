"""Which model and strategy suit a kind of question, learnt from how their answers fared.

Thompson sampling (W. Thompson, 1933; O. Chapelle and L. Li, 2011) over rewards from 0 to 1. A way's reward in a context
is believed to be Beta-distributed around what the way has earned everywhere, so that a context that is new begins with
what others taught. A context is any name, such as a kind of question; no context is a context like others. What is told
is kept as sums and counts, which anybody can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chorus.core.ensemble.records import Strategy
from chorus.core.errors import InvalidRequestError

# What a way has earned everywhere counts for so many of a context's own rewards.
_SHARED = 4.0
_LATENCY_SHARE = 0.25


class Rng(Protocol):
    """The part of `random.Random` that a bandit needs."""

    def betavariate(self, alpha: float, beta: float) -> float:
        """A number in [0, 1], Beta-distributed."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class Way:
    """A way of answering; `model` empty: the coordinator's choice."""

    strategy: Strategy
    model: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an answer fared. `rating` is what its reader, a person or a judge, says of it; all are 0 to 1."""

    succeeded: bool
    took_s: float
    confidence: float = 0.5
    rating: float | None = None


@dataclass(frozen=True, slots=True)
class Earned:
    """Rewards of a way in a context."""

    total: float = 0.0
    count: float = 0.0

    @property
    def mean(self) -> float:
        """Their mean; 0.5 where there are none."""
        return self.total / self.count if self.count else 0.5

    def and_one(self, reward: float, keep: float) -> Earned:
        """With another one, the earlier ones counting `keep` of what they did."""
        return Earned(keep * self.total + reward, keep * self.count + 1.0)


def reward_of(outcome: Outcome, deadline_s: float) -> float:
    """What an outcome is worth, 0 to 1: who knows best how good it is says so, and up to a quarter is for being quick.
    A failure is worth nothing."""
    if not outcome.succeeded:
        return 0.0
    told = outcome.confidence if outcome.rating is None else outcome.rating
    late = min(1.0, max(0.0, outcome.took_s) / deadline_s) if deadline_s > 0 else 1.0
    return min(1.0, max(0.0, told)) * (1.0 - _LATENCY_SHARE * late)


@dataclass(slots=True)
class Bandit:
    """What was learnt. `keep`, over 0 to 1, is what an earlier reward still counts after another of the same way and
    context: under 1, what changes is learnt anew. `frozen`: nothing is learnt, and the best that is known is taken."""

    keep: float = 1.0
    frozen: bool = False
    earned: dict[tuple[str, Way], Earned] = field(default_factory=dict)
    everywhere: dict[Way, Earned] = field(default_factory=dict)

    def choose(self, context: str, allowed: Sequence[Way], rng: Rng) -> Way:
        """One of the ways that the caller's limits allow. Raises InvalidRequestError where there is none."""
        if not allowed:
            raise InvalidRequestError("ensemble", "leaves no model and strategy to choose from; allow more")
        if self.frozen:
            return max(allowed, key=lambda way: self.belief(context, way))
        return max(allowed, key=lambda way: rng.betavariate(*self._beta(context, way)))

    def learn(self, context: str, way: Way, reward: float) -> None:
        """A way has earned a reward, 0 to 1. Raises InvalidRequestError for another one."""
        if not 0.0 <= reward <= 1.0:
            raise InvalidRequestError("rating", f"is {reward}; it goes from 0 to 1")
        if self.frozen:
            return
        key = (context, way)
        self.earned[key] = self.earned.get(key, Earned()).and_one(reward, self.keep)
        self.everywhere[way] = self.everywhere.get(way, Earned()).and_one(reward, self.keep)

    def belief(self, context: str, way: Way) -> float:
        """The reward that is expected."""
        yes, no = self._beta(context, way)
        return yes / (yes + no)

    def table(self) -> Mapping[str, Mapping[Way, Earned]]:
        """What each way has earned, by context, for people to read."""
        contexts = sorted({context for context, _ in self.earned})
        return {
            context: {way: earned for (own, way), earned in sorted(self.earned.items()) if own == context}
            for context in contexts
        }

    def reset(self) -> None:
        """Forgets everything; whether it is frozen stays."""
        self.earned.clear()
        self.everywhere.clear()

    def _beta(self, context: str, way: Way) -> tuple[float, float]:
        own, shared = self.earned.get((context, way), Earned()), self.everywhere.get(way, Earned())
        mean = (shared.total + 1.0) / (shared.count + 2.0)
        return own.total + _SHARED * mean, own.count - own.total + _SHARED * (1.0 - mean)
