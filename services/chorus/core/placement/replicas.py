"""When one more runner is to load a model, and which one: by demand, and beforehand where a pattern says so.

Demand is what runners report: requests that decode or wait for a model, over its slots wherever it is loaded. All
coordinators see the same reports, so they come to the same conclusion, and the runner that they ask is the same as well
(`homes.py`). Only who waits at this coordinator is added, since no report tells of it.

Nothing flaps: a model must be busy for long; while a copy is loading, and for a while after one was asked for, no other
is; none is loaded where it could only take the memory of a model that is in use. Unloading is a runner's own affair.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from chorus.core.fleet.directory import Directory, DirectoryEntry
from chorus.core.fleet.records import EngineKind, ModelState, ModelStatus, RunnerState
from chorus.core.placement.cost import engine_of, load_seconds
from chorus.core.placement.fit import Miss, Situation, fit, load_of, slots_of
from chorus.core.placement.homes import home_key, is_cold, room
from chorus.core.placement.needs import Needs

# Of its slots; from there on requests for a model begin to wait.
FULL_SHARE = 0.9
# After a copy was asked for and should be there, time to see what it changes.
SETTLE_S = 30.0
# A model that was loaded by a pattern and has lost its place since is not loaded for that pattern again for so long:
# coordinators foresee different things, and would take turns with one place.
FORESEEN_S = 900.0
# A runner that does not load a model, whether it may not or can't, is not asked again for so long.
REFUSED_S = 600.0


def load_times(directory: Directory) -> dict[str, float]:
    """About how long each family takes to load that nobody has in memory, by the runner that is quickest; seconds.

    0 for one that somebody has: what will soon be asked for must not make room for another one of which that is true.
    """
    cold: dict[str, float] = {}
    warm: set[str] = set()
    for entry in directory.entries.values():
        for status in entry.record.runner.models:
            family = status.artifact.family
            if status.state is ModelState.AVAILABLE:
                cold[family] = min(cold.get(family, inf), load_seconds(status))
            elif status.state is not ModelState.FAILED:
                warm.add(family)
    return {**cold, **dict.fromkeys(warm, 0.0)}


class LoadReason(StrEnum):
    """Why a model is loaded that no request waits to have loaded."""

    DEMAND = "demand"
    PATTERN = "pattern"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A runner that is to load a model; `figure` is how many times over its slots are taken, or how likely it is."""

    entry: DirectoryEntry
    model: ModelStatus
    reason: LoadReason
    figure: float


@dataclass(slots=True)
class _Demand:
    """How busy a family is where it is loaded."""

    busy: int = 0
    slots: int = 0
    loading: bool = False

    @property
    def share(self) -> float:
        return self.busy / self.slots if self.slots else 0.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """What no load may disturb, and who is not asked for one."""

    demands: Mapping[str, _Demand]
    likely: frozenset[str]
    refused: Container[tuple[str, str]]
    loading: Container[str]

    def may_go(self, status: ModelStatus) -> bool:
        """Whether a model's memory may be taken: it is loaded, and nobody uses it anywhere, nor soon will."""
        family = status.artifact.family
        return status.state is ModelState.LOADED and not self.demands[family].busy and family not in self.likely

    def may_load(self, entry: DirectoryEntry, status: ModelStatus) -> bool:
        """Whether a runner may be asked to load a model: it fits beside all others, or only such ones would go."""
        record = entry.record
        engine = engine_of(record, status)
        if engine is None or engine.kind is not EngineKind.LOCAL:
            return False
        runner_id = record.runner.runner_id
        if runner_id in self.loading or (runner_id, status.artifact.name) in self.refused:
            return False
        if room(record, status, engine):
            return True
        loaded = [other for other in record.runner.models if other.state in (ModelState.LOADED, ModelState.LOADING)]
        return bool(loaded) and all(map(self.may_go, loaded))


class Replicas:
    """Watches demand, and decides. `busy_s`: for how long a model must be full; 0: nothing is loaded for demand.

    Times are seconds on any clock that only goes forward.
    """

    def __init__(self, *, busy_s: float) -> None:
        self._busy_s = busy_s
        self._full_since: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._foreseen: dict[str, float] = {}  # families loaded by a pattern, until they may be again
        self._refused: dict[tuple[str, str], float] = {}
        self._loading: dict[str, float] = {}  # runners that were asked, until they should be done

    def refused(self, wanted: Wanted, now: float) -> None:
        """A runner did not load what it was asked to; somebody else may be asked at once."""
        runner = wanted.entry.record.runner
        self._refused[runner.runner_id, wanted.model.artifact.name] = now + REFUSED_S
        self._loading.pop(runner.runner_id, None)
        self._not_before.pop(wanted.model.artifact.family, None)
        self._foreseen.pop(wanted.model.artifact.family, None)

    def wanted(
        self,
        directory: Directory,
        situation: Situation,
        now: float,
        *,
        waiting: Mapping[str, int],
        likely: Mapping[str, float],
    ) -> list[Wanted]:
        """What is to be loaded where now; each is told once, and taken to be asked for.

        `waiting`: requests at this coordinator, by model as they name it. `likely`: families that will probably be
        asked for soon, and how probably.
        """
        families = {
            status.artifact.name: status.artifact.family
            for entry in directory.entries.values()
            for status in entry.record.runner.models
        }
        demands = _demands(directory)
        for model, count in waiting.items():
            if (family := families.get(model, model)) in demands:
                demands[family].busy += count
        self._not_before = {family: at for family, at in self._not_before.items() if at > now}
        self._foreseen = {family: at for family, at in self._foreseen.items() if at > now}
        self._refused = {place: at for place, at in self._refused.items() if at > now}
        self._loading = {runner_id: at for runner_id, at in self._loading.items() if at > now}
        kept = _Kept(demands, frozenset(likely), self._refused, self._loading)
        found: list[Wanted] = []
        for family, share in self._long_full(demands, now):
            found += self._one(family, LoadReason.DEMAND, share, directory, situation, kept, now)
        for family, probability in sorted(likely.items()):
            if family not in demands or family in self._foreseen:
                continue
            if not demands[family].slots and not demands[family].loading:
                found += self._one(family, LoadReason.PATTERN, probability, directory, situation, kept, now)
        return found

    def _long_full(self, demands: Mapping[str, _Demand], now: float) -> Iterator[tuple[str, float]]:
        """Families whose slots have been taken for long enough, while nobody loads them."""
        full = {family for family, demand in demands.items() if demand.slots and demand.share >= FULL_SHARE}
        # A copy that is loading, whoever asked for it, has to show first what it changes.
        self._full_since = {
            family: now if demands[family].loading else self._full_since.get(family, now) for family in full
        }
        if not self._busy_s:
            return
        for family in sorted(full):
            if now - self._full_since[family] >= self._busy_s:
                yield family, demands[family].share

    def _one(
        self,
        family: str,
        reason: LoadReason,
        figure: float,
        directory: Directory,
        situation: Situation,
        kept: _Kept,
        now: float,
    ) -> list[Wanted]:
        if family in self._not_before:
            return []
        best = _best_place(family, directory, situation, kept)
        if best is None:
            return []
        entry, status = best
        loaded_at = now + load_seconds(status)
        self._loading[entry.record.runner.runner_id] = loaded_at
        self._not_before[family] = loaded_at + SETTLE_S
        self._full_since.pop(family, None)
        if reason is LoadReason.PATTERN:
            self._foreseen[family] = now + FORESEEN_S
        return [Wanted(entry, status, reason, figure)]


def _demands(directory: Directory) -> dict[str, _Demand]:
    """By family, of every family that somebody has."""
    demands: dict[str, _Demand] = {}
    for entry in directory.entries.values():
        record = entry.record
        serves = entry.reachable and record.state is RunnerState.READY
        for status in record.runner.models:
            demand = demands.setdefault(status.artifact.family, _Demand())
            if status.state is ModelState.LOADING:
                demand.loading = True
            elif status.state is ModelState.LOADED and serves:
                load = load_of(record, status)
                demand.slots += slots_of(status, load)
                demand.busy += load.slots_used + load.queued if load is not None else 0
    return demands


def _best_place(
    family: str, directory: Directory, situation: Situation, kept: _Kept
) -> tuple[DirectoryEntry, ModelStatus] | None:
    """The runner that would load it best, on a machine that has no copy yet and where nobody's model must go."""
    needs = Needs(model=family, allow_external=False)
    taken = {
        entry.record.node.node_id
        for entry in directory.entries.values()
        if any(
            status.artifact.family == family and status.state in (ModelState.LOADED, ModelState.LOADING)
            for status in entry.record.runner.models
        )
    }
    best: tuple[tuple[object, ...], DirectoryEntry, ModelStatus] | None = None
    for entry in directory.entries.values():
        if entry.record.node.node_id in taken:
            continue
        found = fit(needs, entry, situation)
        for status, _, _ in [] if isinstance(found, Miss) else found:
            if is_cold(status) and kept.may_load(entry, status):
                key = home_key(entry, status, situation)
                if best is None or key > best[0]:
                    best = (key, entry, status)
    return None if best is None else best[1:]
