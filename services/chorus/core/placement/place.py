"""The choice of a runner for a request: filter, cost, then the better of two draws.

Of the runners that fit, at most `CONSIDERED` are looked at (chosen by chance where there are more). Two of them are
drawn by chance, each with a weight of one over its squared cost, and the cheaper one is taken. So a slow machine is
hardly ever asked while a fast one is idle, equals share the work, and several coordinators that see the same loads, a
heartbeat old, don't all run to the same runner. The dearest of several is never taken.

Where circuit breakers bar everybody who could serve a request, none of them counts: asking somebody who failed lately
is better than refusing everything. Somebody who is merely full is waited for instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import ModelStatus
from chorus.core.placement.cost import Terms, cost_terms, total
from chorus.core.placement.fit import NOTHING_MORE, Miss, RejectionReason, Situation, fit
from chorus.core.placement.needs import Needs
from chorus.core.placement.refusal import refusal

T = TypeVar("T")

# Runners whose cost is worked out for one decision.
CONSIDERED = 16
# Runners drawn from a large pool before all of it is gone through.
DRAWN = 64
# Keeps the weight of a runner that costs nothing finite.
_LEAST_COST = 1e-3


class Rng(Protocol):
    """The part of `random.Random` that placement needs."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...

    def sample(self, population: Sequence[T], k: int) -> list[T]:
        """`k` different ones of a population."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner that can serve a request, with the model that it would use; `cost` is the sum of `terms`, in seconds."""

    entry: DirectoryEntry
    model: ModelStatus
    cost: float
    terms: Terms

    @property
    def runner_id(self) -> str:
        """The runner."""
        return self.entry.record.runner.runner_id

    @property
    def node_id(self) -> str:
        """Its machine."""
        return self.entry.record.node.node_id


@dataclass(frozen=True, slots=True)
class Rejected:
    """A runner that can't serve a request."""

    entry: DirectoryEntry
    miss: Miss

    @property
    def runner_id(self) -> str:
        """The runner."""
        return self.entry.record.runner.runner_id


@dataclass(frozen=True, slots=True)
class Survey:
    """Every runner of a directory, either as a candidate (cheapest first) or as rejected (by id)."""

    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]


def place(
    needs: Needs,
    directory: Directory,
    *,
    rng: Rng,
    situation: Situation = NOTHING_MORE,
    pool: Sequence[str] | None = None,
) -> Candidate:
    """The runner that serves the request. The same arguments and the same state of `rng` give the same one.

    `pool`: ids of the runners to choose from, as a Roster gives it; without it, all of the directory's.

    Raises what `refusal` says where nobody fits: UnknownModelError, UnsupportedFeatureError, NoCapableRunnerError,
    PromptTooLongError, RunnersUnavailableError or OverloadedError.
    """
    ids = sorted(directory.entries) if pool is None else pool
    candidates: list[Candidate] = []
    if len(ids) > DRAWN:
        candidates = _candidates(needs, directory, rng.sample(ids, DRAWN), situation)
    if not candidates:
        # None by chance, or few enough: go through all of them, in an order of chance where not all will be looked at.
        candidates = _candidates(needs, directory, rng.sample(ids, len(ids)), situation)
    if not candidates:
        found = survey(needs, directory, situation=situation)
        if not found.candidates:
            raise refusal(needs, directory, [(other.entry, other.miss) for other in found.rejected], situation)
        candidates = list(found.candidates[:CONSIDERED])
    return _better_of_two(candidates, rng)


def survey(needs: Needs, directory: Directory, *, situation: Situation = NOTHING_MORE) -> Survey:
    """Looks at every runner, for explaining a placement; of two that cost the same, the lesser id comes first."""
    found = _survey(needs, directory, situation)
    reasons = {rejected.miss.reason for rejected in found.rejected}
    if found.candidates or RejectionReason.BREAKER_OPEN not in reasons or RejectionReason.FULL in reasons:
        return found
    return _survey(needs, directory, replace(situation, barred=frozenset()))


def _survey(needs: Needs, directory: Directory, situation: Situation) -> Survey:
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    for _, entry in sorted(directory.entries.items()):
        found = fit(needs, entry, situation)
        if isinstance(found, Miss):
            rejected.append(Rejected(entry, found))
        else:
            candidates.append(_cheapest(needs, entry, found, situation))
    candidates.sort(key=lambda candidate: candidate.cost)
    return Survey(tuple(candidates), tuple(rejected))


def _candidates(needs: Needs, directory: Directory, ids: Iterable[str], situation: Situation) -> list[Candidate]:
    """The first of `ids` that fit, at most as many as are considered."""
    candidates: list[Candidate] = []
    for runner_id in ids:
        entry = directory.get(runner_id)
        if entry is None:
            continue
        found = fit(needs, entry, situation)
        if not isinstance(found, Miss):
            candidates.append(_cheapest(needs, entry, found, situation))
            if len(candidates) == CONSIDERED:
                break
    return candidates


def _cheapest(needs: Needs, entry: DirectoryEntry, models: tuple[ModelStatus, ...], situation: Situation) -> Candidate:
    """A runner with the one of its models that costs least."""
    best: Candidate | None = None
    for model in models:
        terms = cost_terms(needs, entry.record, model, situation)
        cost = total(terms)
        if best is None or cost < best.cost:
            best = Candidate(entry, model, cost, terms)
    assert best is not None, "a runner that fits has a model that fits"
    return best


def _better_of_two(candidates: list[Candidate], rng: Rng) -> Candidate:
    if len(candidates) == 1:
        return candidates[0]
    weights = [1.0 / max(candidate.cost, _LEAST_COST) ** 2 for candidate in candidates]
    first = _draw(weights, rng)
    weights[first] = 0.0
    second = _draw(weights, rng)
    return min(candidates[first], candidates[second], key=lambda candidate: candidate.cost)


def _draw(weights: list[float], rng: Rng) -> int:
    """An index by chance; one of weight 0 is never drawn."""
    point = rng.random() * sum(weights)
    last = 0
    for index, weight in enumerate(weights):
        if weight > 0.0:
            last = index
            point -= weight
            if point < 0.0:
                return index
    return last  # rounding: the point lay at the very end
