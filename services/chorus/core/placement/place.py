"""The choice of a runner for a request: filter, cost, then the better of two draws.

Of the runners that fit, a few are looked at (chosen by chance where there are more, and besides them those that have
read the prompt's beginning already). Two of them are drawn by chance, each with a weight of one over its squared cost,
and the cheaper one is taken. So a slow machine is hardly ever asked while a fast one is idle, equals share the work,
and several coordinators that see the same loads, a heartbeat old, don't all run to the same runner. The dearest of
several is never taken.

Of one family's files the more precise is preferred (`precision.py`): another one of those looked at costs more by what
it loses, which says nothing where all have the same.

Where circuit breakers bar everybody who could serve a request, none of them counts: asking somebody who failed lately
is better than refusing everything. Somebody who is merely full is waited for instead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import ModelStatus
from chorus.core.placement.cost import LOAD_FIXED_S, Terms, cost_terms, total
from chorus.core.placement.fit import NOTHING_MORE, Miss, RejectionReason, Seat, Situation, fit
from chorus.core.placement.homes import home_key, is_cold
from chorus.core.placement.needs import Needs
from chorus.core.placement.precision import loss
from chorus.core.placement.refusal import refusal
from chorus.core.placement.roster import Pool, pool_of

T = TypeVar("T")

# Runners whose cost is worked out for one decision: in a small mesh, where one may be much faster than all the others,
# more than in a large one, where as good a one is among any few.
CONSIDERED = 16
CONSIDERED_OF_MANY = 6
MANY = 64
# At most so many of them for what they have in memory of the prompt.
SHARING = 2
# Keeps the weight of a runner that costs nothing finite.
_LEAST_SQUARE = 1e-6


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
    """A runner that can serve a request, with the model that it would use; `cost` is the sum of `terms`, in seconds.

    `home`: whoever was considered for loading the model, where somebody was.
    """

    entry: DirectoryEntry
    model: ModelStatus
    cost: float
    terms: Terms
    home: str = ""

    @property
    def runner_id(self) -> str:
        """The runner."""
        return self.entry.record.runner.runner_id

    @property
    def node_id(self) -> str:
        """Its machine."""
        return self.entry.record.node.node_id


# The same while it is one of many: objects with names take their time to make.
_Found: TypeAlias = tuple[float, DirectoryEntry, ModelStatus, Terms]


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
    pool: Pool | None = None,
    home: str = "",
    last_resort: bool = True,
) -> Candidate:
    """The runner that serves the request. The same arguments and the same state of `rng` give the same one.

    `pool`: the runners to choose from, as a Roster gives it; without it, all of the directory's. `home`: the one that
    was such a request's home in this directory.

    Where nobody has the model in memory, or whoever has it is so slow or busy that loading it once more may be sooner,
    the one runner that is the model's home (`homes.py`) is considered, and no other one that would have to load it.

    `last_resort`: whether somebody whom a circuit breaker bars is asked where all are barred.

    Raises what `refusal` says where nobody fits: UnknownModelError, UnsupportedFeatureError, NoCapableRunnerError,
    PromptTooLongError, RunnersUnavailableError or OverloadedError.
    """
    everybody, ids = pool_of(needs, directory, sorted(directory.entries)) if pool is None else pool
    found: list[_Found] = []
    if len(ids) > CONSIDERED:
        count = CONSIDERED if len(ids) <= MANY else CONSIDERED_OF_MANY
        drawn = _some(ids, count, rng)
        if situation.shared:
            drawn = _with_those_who_share(drawn, ids, situation)
        found = _find(needs, directory, drawn, situation)
    if len(found) < 2:
        # Hardly anybody by chance, or few enough: go through all of them, in an order of chance.
        found = _find(needs, directory, rng.sample(ids, len(ids)), situation)
    if len(ids) < len(everybody) and all(one[0] >= LOAD_FIXED_S for one in found):
        # Everybody is looked at once for a directory: that takes long in a large mesh.
        known = _home(needs, directory, [home], situation) if home and home not in situation.penalties else []
        cold = known or _home(needs, directory, everybody, situation)
        home = cold[0][1].record.runner.runner_id if cold else ""
        found += cold
    else:
        home = ""
    found = _with_losses(found)
    if not found:
        seen = survey(needs, directory, situation=situation, last_resort=last_resort)
        if not seen.candidates:
            raise refusal(needs, directory, [(other.entry, other.miss) for other in seen.rejected], situation)
        found = _with_one_home([(one.cost, one.entry, one.model, one.terms) for one in seen.candidates], situation)[
            :CONSIDERED
        ]
    cost, entry, model, terms = _better_of_two(found, rng)
    return Candidate(entry, model, cost, terms, home)


def survey(
    needs: Needs, directory: Directory, *, situation: Situation = NOTHING_MORE, last_resort: bool = True
) -> Survey:
    """Looks at every runner, for explaining a placement; of two that cost the same, the lesser id comes first."""
    found = _survey(needs, directory, situation)
    reasons = {rejected.miss.reason for rejected in found.rejected}
    if (
        not last_resort
        or found.candidates
        or RejectionReason.BREAKER_OPEN not in reasons
        or RejectionReason.FULL in reasons
    ):
        return found
    return _survey(needs, directory, replace(situation, barred=frozenset()))


def _survey(needs: Needs, directory: Directory, situation: Situation) -> Survey:
    fitting: list[_Found] = []
    rejected: list[Rejected] = []
    for _, entry in sorted(directory.entries.items()):
        found = fit(needs, entry, situation)
        if isinstance(found, Miss):
            rejected.append(Rejected(entry, found))
        else:
            fitting.append(_cheapest(needs, entry, found, situation))
    candidates = [Candidate(entry, model, cost, terms) for cost, entry, model, terms in _with_losses(fitting)]
    candidates.sort(key=lambda candidate: candidate.cost)
    if candidates and is_cold(candidates[0].model):
        # Nobody has it at a lower cost: it goes to its home, whichever would load it fastest.
        cold = [candidate for candidate in candidates if is_cold(candidate.model)]
        home = max(cold, key=lambda candidate: home_key(candidate.entry, candidate.model, situation))
        candidates.sort(key=lambda candidate: candidate is not home)
    return Survey(tuple(candidates), tuple(rejected))


def _home(needs: Needs, directory: Directory, ids: Sequence[str], situation: Situation) -> list[_Found]:
    """The home of the request's model among runners that would have to load it; empty where nobody could."""
    cold: list[_Found] = []
    for runner_id in ids:
        entry = directory.get(runner_id)
        if entry is None:
            continue
        found = fit(needs, entry, situation)
        if not isinstance(found, Miss) and all(is_cold(status) for status, _, _ in found):
            cold.append(_cheapest(needs, entry, found, situation))
    return _with_one_home(cold, situation)


def _with_one_home(found: list[_Found], situation: Situation) -> list[_Found]:
    """The same with but one of those that would have to load a model."""
    cold = [one for one in found if is_cold(one[2])]
    if len(cold) < 2:
        return found
    home = max(cold, key=lambda one: home_key(one[1], one[2], situation))
    return [one for one in found if one is home or not is_cold(one[2])]


def _some(ids: Sequence[str], count: int, rng: Rng) -> list[str]:
    """`count` different ones of many more; `sample` is slower for so few."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[ids[int(rng.random() * len(ids))]] = None
    return list(drawn)


def _with_those_who_share(drawn: list[str], ids: Sequence[str], situation: Situation) -> list[str]:
    """As many runners as are drawn, first those of `ids` that have read most of the prompt: chance would miss them."""
    shared = situation.shared
    sharing: list[str] = []
    for runner_id, _ in sorted(shared, key=shared.__getitem__, reverse=True):
        if runner_id not in sharing and _has(ids, runner_id):
            sharing.append(runner_id)
            if len(sharing) == SHARING:
                break
    return [*sharing, *(runner_id for runner_id in drawn if runner_id not in sharing)][: len(drawn)]


def _has(ids: Sequence[str], runner_id: str) -> bool:
    index = bisect_left(ids, runner_id)
    return index < len(ids) and ids[index] == runner_id


def _find(needs: Needs, directory: Directory, ids: Iterable[str], situation: Situation) -> list[_Found]:
    """The first of `ids` that fit, at most as many as are considered."""
    candidates: list[_Found] = []
    entries = directory.entries
    for runner_id in ids:
        entry = entries.get(runner_id)
        if entry is None:
            continue
        found = fit(needs, entry, situation)
        if not isinstance(found, Miss):
            candidates.append(_cheapest(needs, entry, found, situation))
            if len(candidates) == CONSIDERED:
                break
    return candidates


def _cheapest(needs: Needs, entry: DirectoryEntry, seats: list[Seat], situation: Situation) -> _Found:
    """A runner with the one of its models that costs least; what that one loses to others is still to be added."""
    found: list[_Found] = []
    for seat in seats:
        terms = cost_terms(needs, entry.record, seat, situation)
        found.append((total(terms), entry, seat[0], terms))
    if len(found) == 1:
        return found[0]
    costs = [cost for cost, _, _, _ in _with_losses(found)]
    return found[costs.index(min(costs))]


def _with_losses(found: list[_Found]) -> list[_Found]:
    """The same, with what a file loses beside the most precise one of its family among them."""
    if len({one[2].artifact.quantization for one in found}) < 2:  # mostly, and cheap to know
        return found
    least: dict[str, float] = {}
    for _, _, model, _ in found:
        own = loss(model.artifact.quantization, model.artifact.parameter_count)
        least[model.artifact.family] = min(own, least.get(model.artifact.family, own))
    return [_with_loss(one, least[one[2].artifact.family]) for one in found]


def _with_loss(one: _Found, least: float) -> _Found:
    cost, entry, model, terms = one
    seconds = (loss(model.artifact.quantization, model.artifact.parameter_count) - least) * dict(terms).get(
        "decode", 0.0
    )
    return (cost + seconds, entry, model, (*terms, ("precision", seconds))) if seconds > 0.0 else one


def _better_of_two(candidates: list[_Found], rng: Rng) -> _Found:
    if len(candidates) == 1:
        return candidates[0]
    weights = [1.0 / (cost * cost + _LEAST_SQUARE) for cost, _, _, _ in candidates]
    first = _draw(weights, rng)
    weights[first] = 0.0
    second = _draw(weights, rng)
    return candidates[first] if candidates[first][0] <= candidates[second][0] else candidates[second]


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
